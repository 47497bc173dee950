"""Chosen contexts as LoRA files: what `hf-causal-context export` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..inference.adapted import StoredAdapter
from ..inference.export import FileFormat, export_contexts, lora_paths


def export_files(
    adapter: str,
    contexts: Sequence[str],
    output_dir: Path,
    *,
    file_format: FileFormat,
    pretrained_model_name_or_path: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    adapter_revision: str | None = None,
) -> list[Path]:
    """Write one LoRA per context of a saved adapter, and return the paths; arguments as for `export_contexts`.

    Raises:
        ValueError: for another kind of adapter, an unknown base, or what `export_contexts` refuses.
        OSError: for an adapter or base that cannot be read, or files that exist or cannot be written.
    """
    stored = StoredAdapter.open(
        adapter, pretrained_model_name_or_path, revision=revision, adapter_revision=adapter_revision
    )
    files = lora_paths(stored.config, contexts, output_dir, file_format)  # refuses before the base is loaded
    base = stored.pipeline(list(files.values()), variant=variant, dtype=dtype)
    return export_contexts(base, contexts, output_dir, file_format=file_format)
