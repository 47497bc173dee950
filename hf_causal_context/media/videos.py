"""Videos as frames: files, folders with one image per frame, and images, which are videos of one frame."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, cast

import fsspec
from PIL import Image

from ..errors import MissingPackageError, UserValueError
from ..messages.installation import installation

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpeg", ".mpg"})
_DIGITS = re.compile(r"(\d+)")


def first_frames(clip: Any, num_frames: int) -> list[Image.Image]:
    """Return the first frames of a clip: an image, or what `datasets.Video(decode=False)` yields.

    Raises:
        ValueError: for a clip with fewer frames, and what `frames` raises.
    """
    found = list(islice(frames(clip), num_frames))
    if len(found) < num_frames:
        raise UserValueError(
            f"the clip has {len(found)} frame{'s' if len(found) > 1 else ''}, fewer than num_frames={num_frames}. "
            f"Lower --num_frames, or remove the clip."
        )
    return found


def frames(clip: Any) -> Iterator[Image.Image]:
    """Yield the frames of a clip, decoded.

    Raises:
        ValueError: for nothing in place of a clip, or a file without a video.
        MissingPackageError: for a video without the package that reads it.
    """
    if isinstance(clip, Image.Image):
        yield clip
        return
    if clip is None or (clip["path"] is None and clip["bytes"] is None):
        raise UserValueError("there is no clip.")
    if not _is_file(clip):
        for path in files_of(clip):
            image = Image.open(path)
            image.load()  # which closes the file as well
            yield image
        return
    with _opened(clip) as container:
        for frame in container.decode(video=0):
            yield frame.to_image().rotate(frame.rotation, expand=True)  # as players turn it


def count_frames(clip: Mapping[str, Any]) -> int:
    """Return how many frames a clip has, without decoding them."""
    if not _is_file(clip):
        return len(files_of(clip))
    with _opened(clip) as container:
        (stream, *_) = container.streams.video
        return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)


def files_of(clip: Mapping[str, Any]) -> list[Path]:
    """Return the files of a clip, in the order of its frames; none of a clip in memory."""
    if clip["path"] is None or clip["bytes"] is not None:
        return []
    path = Path(clip["path"])
    return frame_files(path) if path.is_dir() else [path]


def frame_files(folder: Path) -> list[Path]:
    """Return the visible files in a folder, numbers in their names in their own order: 2.png comes before 10.png."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: [int(p) if p.isdecimal() else p for p in _DIGITS.split(path.name)])


def save_video(images: Sequence[Image.Image], path: Path, frame_rate: int) -> None:
    """Write frames, with an even height and width, as H.264.

    Raises:
        MissingPackageError: without the package that writes it.
    """
    av = video_package()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(frame_rate))
        stream.width, stream.height = images[0].size
        stream.pix_fmt = "yuv420p"  # the one that all players know
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


def _is_file(clip: Mapping[str, Any]) -> bool:
    """Whether it is a video in one piece, wherever that is and whatever its name."""
    if clip["bytes"] is not None:
        return True
    path = Path(clip["path"])
    # Pillow registers MPEG, too, which it cannot decode.
    return not (path.is_dir() or path.suffix.lower() in Image.registered_extensions().keys() - VIDEO_SUFFIXES)


@contextmanager
def _opened(clip: Mapping[str, Any]) -> Iterator[Any]:
    av = video_package()
    opened = fsspec.open(clip["path"], "rb") if clip["bytes"] is None else io.BytesIO(clip["bytes"])
    with cast(Any, opened) as file, av.open(file) as container:
        if not container.streams.video:
            raise UserValueError("the file has no video in it.")
        yield container


def video_package() -> Any:
    """Return PyAV.

    Raises:
        MissingPackageError: where it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MissingPackageError(
            f"Video files need PyAV; folders with one image per frame do not. {installation('video')}"
        ) from error
    return av
