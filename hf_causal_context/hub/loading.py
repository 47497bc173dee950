"""An adapter of the Hub on its base, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from ..adapter.followed_pipeline import follow
from ..errors import UserTypeError
from ..inference.adapted import StoredAdapter, device
from .saved_adapter import SavedAsAdapter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Arguments of every `from_pretrained` that say where files are kept: the adapter's go there, too.
_CACHE = ("cache_dir", "force_download", "local_files_only")


class CausalContextPipeline:
    """Loads an adapter of images on its base; what it makes is of the base's own pipeline class."""

    def __init__(self) -> None:
        raise UserTypeError("Call CausalContextPipeline.from_pretrained(folder_or_repository).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> DiffusionPipeline:
        """Return the pipeline that an adapter was trained for, with the adapter on it.

        Its `save_pretrained` and `push_to_hub` write the adapter, which this call loads again, and not the base, as
        those of a PeftModel do. `DiffusionPipeline.save_pretrained(pipe, folder)` writes the base as well.

        Args:
            pretrained_model_name_or_path: the adapter's folder or repository.
            revision: of the adapter's repository: a branch, tag or commit. Its config names that of the base.
            subfolder: where in it the adapter is.
            token: for private repositories, the adapter's and the base's, as in huggingface_hub.
            options: of diffusers' own `from_pretrained`, such as `dtype` (by default float32), `device_map`,
                `quantization_config`, `variant` and `cache_dir`, or components to use instead of the base's.

        Raises:
            ValueError: for another kind of adapter, a damaged one, or one that does not name its base.
            OSError: for an adapter or base that cannot be read.

        Example:
            >>> pipe = CausalContextPipeline.from_pretrained("user/digits-context")   # doctest: +SKIP
            >>> with intervene(pipe, "thickness+slant"):                              # doctest: +SKIP
            ...     pipe().images[0]
        """
        return _pipeline(_open(pretrained_model_name_or_path, revision, subfolder, token, options), **options)


class AutoCausalContextModel:
    """Loads an adapter of a language model on its base, as PEFT's AutoPeftModelForCausalLM and ForSeq2SeqLM do.

    The adapter's config says which of the two it is, so there is one class for both.
    """

    def __init__(self) -> None:
        raise UserTypeError("Call AutoCausalContextModel.from_pretrained(folder_or_repository).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> PeftModel:
        """Return the language model that an adapter was trained for, with the adapter on it.

        Unlike PEFT's classes it compares the adapter with the base, and refuses damaged weights. Its `save_pretrained`
        and `push_to_hub` are PEFT's: they write the adapter.

        Args:
            pretrained_model_name_or_path: the adapter's folder or repository.
            adapter_name: what to call the adapter.
            is_trainable: whether to go on training it.
            revision: of the adapter's repository: a branch, tag or commit. Its config names that of the base.
            subfolder: where in it the adapter is.
            token: for private repositories, the adapter's and the base's, as in huggingface_hub.
            options: of transformers' own `from_pretrained`, such as `dtype`, `device_map`, `quantization_config` and
                `cache_dir`.

        Raises:
            ValueError: for another kind of adapter, a damaged one, or one that does not name its base.
            OSError: for an adapter or base that cannot be read.

        Example:
            >>> model = AutoCausalContextModel.from_pretrained("user/my-style")       # doctest: +SKIP
            >>> model.generate(**inputs, context="brief+formal")                      # doctest: +SKIP
        """
        adapter = _open(pretrained_model_name_or_path, revision, subfolder, token, options)
        return adapter.stock_language_model(adapter_name=adapter_name, is_trainable=is_trainable, **options)


def load(
    repo_or_folder: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> DiffusionPipeline | PeftModel:
    """Return an adapter on its base, in float32, on the GPU if there is one: a pipeline, or a language model.

    It is `CausalContextPipeline.from_pretrained` or `AutoCausalContextModel.from_pretrained`, whose errors it raises,
    for those who do not know which they need.

    Args:
        repo_or_folder: the adapter's.
        revision: of its repository: a branch, tag or commit.
        token: for private repositories, the adapter's and the base's, as in huggingface_hub.
    """
    adapter = _open(repo_or_folder, revision, None, token, {})
    if adapter.is_of_language_model:
        return adapter.stock_language_model(dtype=torch.float32).to(device())
    return _pipeline(adapter).to(device())


def _pipeline(adapter: StoredAdapter, **options: Any) -> DiffusionPipeline:
    pipe = adapter.stock_pipeline(**options)
    follow(pipe, SavedAsAdapter)
    return pipe


def _open(
    adapter: str | Path, revision: str | None, subfolder: str | None, token: str | bool | None, options: dict[str, Any]
) -> StoredAdapter:
    cache = {name: options[name] for name in _CACHE if name in options}
    return StoredAdapter.open(adapter, adapter_revision=revision, token=token, subfolder=subfolder, cache=cache)
