"""What is told of options before anything that takes long is imported or read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..adapter.storage.download import local_folder
from ..bases.names import check_there
from ..data.arguments import ContextDataArguments, check_apart, check_source
from ..errors import UserValueError

# Of commands whose settings do not check their numbers themselves.
_LARGEST_SEEDS = {"seed": 2**32 - 1, "seeds": 2**63 - 1}  # NumPy's, and torch's
_AT_LEAST_ONE = ("num_inference_steps", "batch_size", "max_new_tokens", "resolution", "num_frames")


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
    for name in ("output_dir", "output_file", "contact_sheet"):
        if (path := getattr(arguments, name, None)) is not None:
            _check_writable(f"--{name}: {path}", Path(path).absolute())
    if isinstance(arguments, ContextDataArguments):
        check_apart(arguments)


def check_numbers(arguments: Any) -> None:
    """Refuse numbers that no base takes.

    Raises:
        ValueError: naming one.
    """
    for name in _AT_LEAST_ONE:
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UserValueError(f"--{name}={value} must be at least 1.")
    for name, largest in _LARGEST_SEEDS.items():
        given = getattr(arguments, name, None)
        for seed in given if isinstance(given, list) else [0 if given is None else given]:
            if abs(seed) > largest:
                raise UserValueError(f"--{name}: {seed} is too large a number. Give a smaller one, such as 0.")


def _check_writable(what: str, path: Path) -> None:
    there = next(each for each in (path if path.is_dir() else path.parent, *path.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{what} cannot be made, since {there} is a file. Choose another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{what} cannot be made, since {there} cannot be written to. Choose another place.")
