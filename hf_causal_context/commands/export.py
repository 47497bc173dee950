"""Chosen contexts as LoRA files: what `hf-causal-context export` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..inference.adapted import load_adapted_base, stored_config
from ..inference.export import FileFormat, _files, export_contexts


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
    config = stored_config(adapter, adapter_revision=adapter_revision)
    files = _files(config, contexts, output_dir, file_format)  # refuses before the base is loaded
    base = load_adapted_base(
        adapter,
        pretrained_model_name_or_path,
        contexts=list(files.values()),
        revision=revision,
        variant=variant,
        dtype=dtype,
        adapter_revision=adapter_revision,
    )
    return export_contexts(base, contexts, output_dir, file_format=file_format)
