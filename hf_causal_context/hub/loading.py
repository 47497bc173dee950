"""An adapter of the Hub, back on its base."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline
from peft import PeftModel

from ..inference.adapted import StoredAdapter


def load(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> DiffusionPipeline | PeftModel:
    """Return an adapter on its base, ready for use, on the GPU if there is one: a pipeline, or a language model.

    Args:
        repo_or_folder: the adapter's.
        revision: of its repository: a branch, tag or commit.
        token: for a private one, as in huggingface_hub; a private base needs HF_TOKEN or a login.

    Raises:
        ValueError: for another kind of adapter, a damaged one, or one that does not name its base.
        OSError: for an adapter or base that cannot be read.

    Example:
        >>> pipe = load("user/digits-context")                   # doctest: +SKIP
        >>> with intervene(pipe, "thickness+slant"):             # doctest: +SKIP
        ...     pipe().images[0]
    """
    adapter = StoredAdapter.open(repo_or_folder, adapter_revision=revision, token=token)
    return adapter.language_model()[0] if adapter.is_of_language_model else adapter.pipeline().pipe
