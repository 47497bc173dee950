"""Pictures of chosen contexts as files: what `hf-causal-context generate` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .._files import CONFIG, checkpoint_steps
from ..adapter.baking import context_strengths
from ..adapter.compatibility import check_fits
from ..adapter.config import CausalContextConfig
from ..adapter.storage.download import download
from ..adapter.storage.files import read_header, read_weights
from ..adapter.storage.layout import AdapterError
from ..bases.families import Base
from ..bases.language import load_language_model
from ..bases.loading import load_base
from ..bases.names import is_packaged
from ..contexts import Context, shown
from .pipelines import adapter_places, attach

LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


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
    return CausalContextConfig.read(folder, adapter)


def load_adapted_language_model(
    adapter: str,
    pretrained_model_name_or_path: str | None = None,
    *,
    contexts: Sequence[Context] = (),
    revision: str | None = None,
    dtype: str = "float32",
    adapter_revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter's base, by default the one it names, with the adapter attached, onto the GPU if there is one.

    The tokenizer is the adapter's, if it comes with one, else the base's.

    Args:
        adapter: a folder, or the id of a repository on the Hub.
        revision: of the base.
        adapter_revision: of the adapter's repository.
        token: for an adapter's private repository, as in huggingface_hub.

    Raises:
        ValueError: for another kind of adapter or base, or contexts with concepts that the adapter lacks.
        OSError: for an adapter or base that cannot be read.
    """
    folder = download(adapter, revision=adapter_revision, token=token, tokenizer=True)
    config = config_in(folder, adapter)
    library = (config.auto_mapping or {}).get("parent_library") or ""
    if library.startswith("diffusers"):
        raise ValueError(
            f"{adapter} is an adapter of a diffusion model. `hf-causal-context generate` makes pictures with it."
        )
    if config.task_type is not None and config.task_type not in LANGUAGE_TASKS:
        raise ValueError(f"{adapter} is an adapter for {config.task_type}, which writes no texts.")
    base_name, revision = base_of(adapter, config, pretrained_model_name_or_path, revision)
    context_strengths(config, contexts)  # refuses what the adapter does not have before anything is loaded
    tensors = read_header(folder, config.layout(), adapter)
    model = load_language_model(base_name, revision, getattr(torch, dtype))
    own = (folder / "tokenizer_config.json").is_file()
    source, its_revision = (str(folder), None) if own else (base_name, revision)
    tokenizer = cast(PreTrainedTokenizerBase, _tokenizer(source, its_revision, adapter if own else None))
    check_fits(model, config, tensors, adapter)
    read_weights(folder, adapter)  # refuses values that PEFT would load
    adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    return adapted.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _tokenizer(source: str, revision: str | None, adapter: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # its files may hold anything, and transformers raises anything
        if adapter is None:
            raise
        raise AdapterError(
            f"The tokenizer of {adapter} cannot be read ({type(error).__name__}: {error}). Take tokenizer*.json out of "
            "its folder to use the tokenizer of its base."
        ) from error
