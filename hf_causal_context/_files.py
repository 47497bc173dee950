"""Names of the files in an adapter's folder, and how files are written: whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = ".partial-*"  # what a killed process leaves of what it was writing

CARD, CARD_CONTENTS = "README.md", "card.json"
RESULTS, RESULTS_IMAGE, REPORT = "results.md", "results.png", "evaluation/report.json"

BASE_GAP = "base_gap.json"  # beside an adapter

DATA_RECORD = "training_data.json"

ARGUMENTS = "training_arguments.json"

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


# Of a context's name, in bytes: file systems take 255, and there are endings, numbers and names of images beside it.
_LONGEST = 180


def file_name(label: str) -> str:
    """Return a context's name as part of a file name: with "_" for what file names may not hold.

    Of one that is too long the beginning is left, and a number that tells it from others.
    """
    name = "".join(c if c.isalnum() or c in "+=.-_" else "_" for c in label)
    name = "_" + name[1:] if name.startswith(".") else name  # neither hidden nor ".."
    if len(name.encode()) <= _LONGEST:
        return name
    number = hashlib.sha256(label.encode()).hexdigest()[:8]
    return f"{name.encode()[: _LONGEST - 9].decode(errors='ignore')}-{number}"


def sibling(folder: Path, ending: str) -> Path:
    """Return the place beside a folder, however that is written, of the same name with an ending."""
    named = folder if folder.name not in ("", "..") else folder.resolve()  # "." and ".." are no names
    return named.with_name(named.name + ending)


def in_one_spelling(name: str | Path) -> str:
    """Return a name with accents as part of their letters: macOS takes them apart, and what people type does not."""
    return unicodedata.normalize("NFC", str(name))


def first_line(error: BaseException) -> str:
    """Return what an error says, without what clients and devices append to it; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def complete_files(folder: Path) -> Iterator[Path]:
    """Where to write files and folders that shall appear in `folder`, which may hold others.

    When the body ends, each appears complete, over an earlier one of its name; when it fails, none does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL.removesuffix("*"), dir=folder) as place:
        yield (unfinished := Path(place))
        for path in list(unfinished.iterdir()):
            there = folder / path.name
            if path.is_dir() and there.is_dir():  # folders, unlike files, are not replaced
                there.rename(unfinished / f".earlier-{path.name}")
            path.rename(there)


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Where to write a file or folder that shall appear at `path` when it is complete, over an earlier one, or not."""
    with complete_files(path.parent) as folder:
        yield folder / path.name


def checkpoint_steps(output_dir: Path) -> dict[int, Path]:
    """Optimizer step -> folder of every complete checkpoint, oldest first."""
    found = {
        int(match[1]): path
        for path in output_dir.glob("checkpoint-*")
        if (match := CHECKPOINT_NAME.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file of a run or an adapter holds; nothing where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
