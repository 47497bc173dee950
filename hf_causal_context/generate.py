"""Pictures of chosen contexts as files: what `hf-causal-context generate` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .adapter.config import CausalContextConfig
from .adapter.export import context_strengths
from .adapter.stored import CONFIG, AdapterError, download, read_config
from .base_names import is_packaged
from .contexts import Context, file_name, shown
from .pipelines import adapter_places, attach
from .training.bases import load_base
from .training.checkpoints import checkpoint_steps
from .training.families import Base
from .training.generation import generate, picture_grid, to_image

LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def generate_files(
    adapter: str,
    contexts: Sequence[str],
    output_dir: Path,
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    pretrained_model_name_or_path: str | None = None,
    prompt: str | None = None,
    class_label: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    observational_name: str = "obs",
    grid: bool = False,
    adapter_revision: str | None = None,
    token: str | bool | None = None,
) -> list[Path]:
    """Write one PNG per context and seed (``thick+slant-seed3.png``), or one grid, and return the paths.

    Raises:
        ValueError: for another kind of adapter, an unknown base, unknown concepts, or what `generate` refuses.
        OSError: for an adapter or base that cannot be read, or pictures that cannot be written.
    """
    parsed = [Context() if name == observational_name else Context.parse(name) for name in contexts]
    base = load_adapted_base(
        adapter,
        pretrained_model_name_or_path,
        contexts=parsed,
        revision=revision,
        variant=variant,
        dtype=dtype,
        adapter_revision=adapter_revision,
        token=token,
    )
    rows = generate(
        base,
        parsed,
        seeds=seeds,
        prompt=prompt,
        class_label=class_label,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        resolution=resolution,
        batch_size=batch_size,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    labels = [str(context) or observational_name for context in parsed]
    if grid:
        path = output_dir / "grid.png"
        picture_grid(rows, labels).save(path)
        return [path]
    paths = []
    for label, row in zip(labels, rows, strict=True):
        for seed, picture in zip(seeds, row, strict=True):
            paths.append(output_dir / f"{file_name(label)}-seed{seed}.png")
            to_image(picture).save(paths[-1])
    return paths


def load_adapted_base(
    adapter: str,
    pretrained_model_name_or_path: str | None = None,
    *,
    contexts: Sequence[Context] = (),
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    adapter_revision: str | None = None,
    token: str | bool | None = None,
) -> Base:
    """Load an adapter's base, by default the one it names, with the adapter attached, onto the GPU if there is one.

    Args:
        adapter: a folder, or the id of a repository on the Hub.
        revision: of the base.
        adapter_revision: of the adapter's repository.
        token: for an adapter's private repository, as in huggingface_hub.

    Raises:
        ValueError: for another kind of adapter, an unknown base, or contexts with concepts that the adapter lacks.
        OSError: for an adapter or base that cannot be read.
    """
    folder = download(adapter, revision=adapter_revision, token=token, places=adapter_places())
    config = config_in(folder, adapter)
    if config.task_type in LANGUAGE_TASKS:
        raise ValueError(
            f"{adapter} is an adapter of a language model, not of a diffusers pipeline. `hf-causal-context "
            "generate-text` writes texts with it; save_baked(model, context, folder) in Python exports it."
        )
    base_name, revision = base_of(adapter, config, pretrained_model_name_or_path, revision)
    context_strengths(config, contexts)  # refuses what the adapter does not have before anything is loaded
    torch_dtype = None if dtype == "float32" else getattr(torch, dtype)
    base = load_base(base_name, revision=revision, variant=variant, torch_dtype=torch_dtype)
    base.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    attach(base.pipe, folder, adapter)
    return base


def base_of(
    adapter: str, config: CausalContextConfig, given: str | None, revision: str | None
) -> tuple[str, str | None]:
    """Folder or Hub id of an adapter's base and its revision: what is given, by default what the adapter names.

    Raises:
        ValueError: if neither is known.
        AdapterError: for an adapter from the Hub that names a folder.
        FileNotFoundError: for a folder that is not on this machine.
    """
    name = given or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not name its base. Give --pretrained_model_name_or_path.")
    if given is None and not Path(adapter).is_dir() and not is_packaged(name):
        _check_repository(adapter, name)
    if given is None and Path(name).is_absolute() and not Path(name).exists():
        raise FileNotFoundError(
            f"{adapter} was trained on the base {name}, which is not here. Give --pretrained_model_name_or_path."
        )
    return name, revision or (config.revision if given is None else None)


def _check_repository(adapter: str, base: str) -> None:
    """Refuse folders on this machine (AdapterError): what an adapter from elsewhere names is on the Hub, too."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        raise AdapterError(
            f"{adapter} comes from the Hub, and the base that it names, {shown(base)}, is no repository there: it was "
            "trained on a folder of another machine. Give --pretrained_model_name_or_path."
        ) from None


def stored_config(
    adapter: str, *, adapter_revision: str | None = None, token: str | bool | None = None
) -> CausalContextConfig:
    """The config of an adapter in a folder or on the Hub.

    Args:
        adapter: a folder, or the id of a repository on the Hub.
        adapter_revision: of that repository.
        token: for a private repository, as in huggingface_hub.

    Raises:
        AdapterError: for another kind of adapter, or a config that cannot be used.
        OSError: for something that holds no adapter, or cannot be reached.
    """
    return config_in(download(adapter, revision=adapter_revision, token=token), adapter)


def config_in(folder: Path, adapter: str) -> CausalContextConfig:
    """The config of an adapter whose folder is known; see `stored_config`."""
    if not (folder / CONFIG).exists():
        checkpoints = ", ".join(str(path) for path in checkpoint_steps(folder).values())
        raise FileNotFoundError(
            f"{adapter} holds no adapter: there is no {CONFIG} in it. "
            + (f"Its training is not finished: resume it, or use a checkpoint: {checkpoints}." if checkpoints else "")
            + ("" if checkpoints else "Give the folder that a training wrote, or the id of a repository.")
        )
    return read_config(folder, adapter)
