"""What is told of folders before anything that takes long is imported or read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapter.storage.download import local_folder
from ..bases.names import check_there
from ..data.arguments import ContextDataArguments, check_source


def check_places(arguments: Any) -> None:
    """Refuse folders that a command's settings name, where they are missing or in the way.

    Raises:
        OSError, ValueError: saying which.
    """
    if isinstance(arguments, ContextDataArguments):
        check_source(arguments)
    if (adapter := getattr(arguments, "adapter", None)) is not None:
        local_folder(adapter)
    if base := getattr(arguments, "pretrained_model_name_or_path", None):
        check_there(base)
    output_dir = getattr(arguments, "output_dir", None)
    if output_dir is not None and Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise NotADirectoryError(f"--output_dir: {output_dir} is a file. Give a folder, which need not exist yet.")
