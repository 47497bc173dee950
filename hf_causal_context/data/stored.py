"""What a row holds, as it is stored: the bytes of an image, a mask or a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec

from ..errors import UserValueError
from ..media.videos import frame_files


def stored_bytes(value: Any) -> bytes:
    """Return what is in the file of a value, or in the value itself.

    Raises:
        ValueError: for no value.
        OSError: for a file that is not there.
    """
    if value is None:
        raise UserValueError("no value")
    if not (isinstance(value, dict) and "bytes" in value):
        return value if isinstance(value, bytes) else repr(value).encode()
    if value["bytes"] is not None:
        return value["bytes"]
    path = Path(value["path"])
    if path.is_dir():  # of frames
        return b"".join(frame.read_bytes() for frame in frame_files(path))
    if path.is_file():  # whose name may look like an address to fsspec
        return path.read_bytes()
    with fsspec.open(value["path"], "rb") as file:
        return file.read()  # type: ignore[union-attr]
