"""Pictures of chosen contexts as files: what `hf-causal-context generate` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig

from .adapter.config import CausalContextConfig
from .contexts import ConceptSet, Context, file_name
from .pipelines import load_context_adapter
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
) -> list[Path]:
    """Write one PNG per context and seed (``thick+slant-seed3.png``), or one grid, and return the paths.

    Raises:
        ValueError: for another kind of adapter, an unknown base, unknown concepts, or what `generate` refuses.
        OSError: for an adapter or base that cannot be read, or pictures that cannot be written.
    """
    parsed = [Context() if name == observational_name else Context.parse(name) for name in contexts]
    base = load_adapted_base(
        adapter, pretrained_model_name_or_path, contexts=parsed, revision=revision, variant=variant, dtype=dtype
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
) -> Base:
    """Load an adapter's base, by default the one it names, with the adapter attached, onto the GPU if there is one.

    Raises:
        ValueError: for another kind of adapter, an unknown base, or contexts with concepts that the adapter lacks.
        OSError: for an adapter or base that cannot be read.
    """
    config = stored_config(adapter)
    if config.task_type in LANGUAGE_TASKS:
        raise ValueError(
            f"{adapter} is an adapter of a language model, not of a diffusers pipeline. `hf-causal-context "
            "generate-text` writes texts with it; save_baked(model, context, folder) in Python exports it."
        )
    base_name, revision = base_of(adapter, config, pretrained_model_name_or_path, revision)
    ConceptSet(config.concepts).mask(contexts)  # refuses unknown names before anything is loaded
    torch_dtype = None if dtype == "float32" else getattr(torch, dtype)
    base = load_base(base_name, revision=revision, variant=variant, torch_dtype=torch_dtype)
    base.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    load_context_adapter(base.pipe, adapter)
    return base


def base_of(
    adapter: str, config: CausalContextConfig, given: str | None, revision: str | None
) -> tuple[str, str | None]:
    """Folder or Hub id of an adapter's base and its revision: what is given, by default what the adapter names.

    Raises:
        ValueError: if neither is known.
        FileNotFoundError: for a folder that is not on this machine.
    """
    name = given or config.base_model_name_or_path
    if name is None:
        raise ValueError(f"{adapter} does not name its base. Give --pretrained_model_name_or_path.")
    if given is None and Path(name).is_absolute() and not Path(name).exists():
        raise FileNotFoundError(
            f"{adapter} was trained on the base {name}, which is not here. Give --pretrained_model_name_or_path."
        )
    return name, revision or (config.revision if given is None else None)


def stored_config(adapter: str) -> CausalContextConfig:
    """The config of an adapter in a folder or on the Hub.

    Raises:
        ValueError: for another kind of adapter.
        OSError: for something that holds no adapter.
    """
    if Path(adapter).is_dir() and not Path(adapter, "adapter_config.json").exists():
        checkpoints = ", ".join(str(path) for path in checkpoint_steps(Path(adapter)).values())
        raise FileNotFoundError(
            f"{adapter} holds no adapter (adapter_config.json). "
            + (f"Its training is not finished: resume it, or use a checkpoint: {checkpoints}." if checkpoints else "")
        )
    try:
        config = PeftConfig.from_pretrained(adapter)
    except ValueError as error:
        raise FileNotFoundError(
            f"{adapter} is no folder here, and no adapter was found under that name on the Hub ({error}). Give a "
            "folder with an adapter_config.json, or the id of a repository: user/name."
        ) from error
    if not isinstance(config, CausalContextConfig):
        raise ValueError(f"{adapter} is a {config.peft_type} adapter; only causal context adapters have contexts.")
    return config
