"""Captions of images in folders: metadata files as `datasets` and diffusers read them, text files as kohya does."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from .._files import in_one_spelling
from ..errors import UserValueError
from ..messages.wording import short_repr

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIXES = frozenset({".txt", ".caption"})


def read_captions(
    files: Iterable[Path], images: Collection[Path], column: str | None = None
) -> tuple[dict[Path, str], set[Path]]:
    """Return the captions of images that have one, and the files that hold them.

    A metadata file names images in or below its own folder. Any other file is a caption if it has the name of an image
    and a suffix for captions.

    Args:
        files: the files that may hold captions, and any others.
        images: the images that may be captioned.
        column: of the captions in metadata; by default "text", else "caption".

    Raises:
        FileNotFoundError: for an image that metadata name and that does not exist.
        ValueError: for metadata that cannot be read, text that is not UTF-8, or two captions of an image.
    """
    known = {in_one_spelling(image): image for image in images}
    named = by_stem(images)
    captions: dict[Path, str] = {}
    used = set()
    for file in files:
        if file.name in METADATA:
            found = _of_metadata(file, known, column)
        elif file.suffix.lower() in CAPTION_SUFFIXES:
            found = _of_text(file, named.get(in_one_spelling(file.with_suffix("")), []))
        else:
            continue
        for where, image, text in found:
            if image in captions:
                raise UserValueError(f"{where}: {image.name!r} has a second caption. Keep one per image.")
            captions[image] = text
            used.add(file)
    return captions, used


def by_stem(images: Iterable[Path]) -> dict[str, list[Path]]:
    """Return images by what files beside them are named by, see `stem_of`, in one spelling."""
    found: dict[str, list[Path]] = {}
    for image in images:
        found.setdefault(in_one_spelling(stem_of(image)), []).append(image)
    return found


def stem_of(image: Path) -> Path:
    """Return a path without its suffix; folders of frames have none, dots are a part of their names."""
    return image if image.is_dir() else image.with_suffix("")


def _of_text(file: Path, images: list[Path]) -> Iterator[tuple[str, Path, str]]:
    """Where a caption stands, its image, and the caption."""
    for image in images:
        yield repr(str(file)), image, _decoded(file.read_bytes(), True, repr(str(file))).strip()


def _of_metadata(file: Path, images: Mapping[str, Path], column: str | None) -> Iterator[tuple[str, Path, str]]:
    where = ""
    for number, entry, shown in _csv_rows(file) if file.suffix == ".csv" else _json_rows(file):
        where = f"Line {number} of {str(file)!r}"
        given = entry if isinstance(entry, dict) else {}
        name = given.get("file_name")
        text = given.get(column or ("text" if "text" in given else "caption"))
        if not isinstance(name, str) or not isinstance(text, str):
            also = "" if column else ' "caption" will do for "text", and caption_column= names another.'
            raise UserValueError(
                f'{where} must be {{"file_name": "...", "{column or "text"}": "..."}}; received {short_repr(shown)}.'
                + also
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserValueError(f"{where}: the text holds half a character. Correct it.")
        relative = os.path.normpath(name)
        # Judged by name, not resolved: images that are links, as in the cache of the Hub, are the user's own.
        if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
            raise UserValueError(
                f"{where}: file_name {short_repr(name)} leaves the folder. Only images inside it can be named."
            )
        image = images.get(in_one_spelling(file.parent / relative))
        if image is None:
            raise FileNotFoundError(f"{where}: there is no image {short_repr(name)} in the folder. Correct file_name.")
        yield where, image, text
    if not where:
        raise UserValueError(f"{str(file)!r} has no rows. Add a line for each image, or remove it.")


def _json_rows(file: Path) -> Iterator[tuple[int, Any, str]]:
    """Number, value and text of each line that is not blank."""
    # Bytes, because text mode would also end lines where Unicode does.
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"Line {number} of {str(file)!r}"
        line = _decoded(raw, number == 1, where).strip()
        try:
            yield number, json.loads(line), line
        except (ValueError, RecursionError) as error:  # too many digits, too many brackets
            raise UserValueError(f"{where} is not JSON ({error}). Write one object per line.") from None


def _csv_rows(file: Path) -> Iterator[tuple[int, Any, str]]:
    """Number of the last line, value and text of each row."""
    rows = csv.DictReader(io.StringIO(_decoded(file.read_bytes(), True, repr(str(file))), newline=""), strict=True)
    try:
        for row in rows:
            if any(cast(Any, row).get(None) or ()):  # where the reader puts what the header has no name for
                raise UserValueError(
                    f"Line {rows.line_num} of {str(file)!r} has more cells than the header: a caption ends at its "
                    "first comma, unless it stands in quotes. Put quotes around it."
                )
            yield rows.line_num, row, str(row)
    except csv.Error as error:
        raise UserValueError(
            f"Line {rows.reader.line_num} of {str(file)!r} is not CSV ({error}). Correct it."
        ) from None


def _decoded(raw: bytes, first: bool, where: str) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UserValueError(f"{where} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
