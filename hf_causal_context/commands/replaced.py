"""What commands say of files that they write over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..messages.progress import say


@contextmanager
def told_replacements(folder: Path) -> Iterator[list[Path]]:
    """The body writes into a folder, and puts what it wrote into the list; said is how much was there before."""
    there = set(folder.iterdir()) if folder.is_dir() else set()
    written: list[Path] = []
    yield written
    if replaced := there.intersection(written):
        say(f"Replaced files of the same names: {len(replaced)}.")
