"""Folders of images, one per context: ``root/obs``, ``root/thick``, ``root/thick+slant``."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .._messages import quoted, short_repr
from ..contexts import ConceptSet, ContextLike, context_text
from ..errors import UserValueError
from .interventional import InterventionalData, from_dataset

METADATA = "metadata.jsonl"
IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)


def load_folders(
    root: str | Path,
    *,
    concepts: Sequence[str] | ConceptSet | None = None,
    observational_name: str = "obs",
    joint_separator: str = "+",
    held_out_contexts: Iterable[ContextLike] = (),
    training_contexts: Iterable[ContextLike] | None = None,
    streaming: bool = False,
) -> InterventionalData:
    """Read one folder per context, named as `Context.parse` reads them; `observational_name` is the observational one.

    With a `joint_separator` such as "-", "thick-slant" is read as "thick+slant"; no concept's name may contain it.

    Captions are optional: a ``metadata.jsonl`` in each folder, with ``file_name`` and ``text`` on every line. Images
    are opened when they are used. What is trained on and what is held out: see `from_dataset`.

    Raises:
        FileNotFoundError: for a missing root, or an image that the metadata names and that does not exist.
        ValueError: for no folders, folders without images, two folders of one context, bad metadata, captions in some
            folders only, and what `from_dataset` raises.
    """
    folders = context_folders(Path(root), observational_name, joint_separator, "images")
    images = {context: _images(folder) for context, folder in folders.items()}
    captions = {
        context: _captions(folder, images[context])
        for context, folder in folders.items()
        if (folder / METADATA).exists()
    }
    if captions and (without := [folder for context, folder in folders.items() if context not in captions]):
        raise UserValueError(
            f"{_listed(without)} has no {METADATA}, while other folders have. Caption every folder, or none."
        )

    columns = {
        "image": [str(image) for paths in images.values() for image in paths],
        "context": [context for context, paths in images.items() for _ in paths],
    }
    features = {"image": Image(), "context": Value("string")}
    if captions:
        columns["caption"] = [text for texts in captions.values() for text in texts]
        features["caption"] = Value("string")
    data = from_dataset(
        Dataset.from_dict(columns, features=Features(features)),
        concepts=concepts,
        caption_column="caption" if captions else None,
        observational_name=observational_name,
        held_out_contexts=held_out_contexts,
        training_contexts=training_contexts,
    )
    if not streaming:
        return data
    assert isinstance(data.rows, Dataset)
    held_out = {context: rows.to_iterable_dataset() for context, rows in data.held_out.items()}  # type: ignore[union-attr]
    return replace(data, rows=data.rows.to_iterable_dataset(), held_out=held_out)


def context_folders(root: Path, observational_name: str, joint_separator: str, held: str) -> dict[str, Path]:
    """Return the folder of each context; `held` is what they hold, for messages.

    Raises:
        FileNotFoundError: for a missing root.
        ValueError: for no folders, a name that is no context, or two folders of one context.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{str(root)!r} is not a folder. Give the folder that holds one folder of {held} per context, such as "
            f"'{observational_name}', 'thick' and 'thick+slant'."
        )
    folders: dict[str, Path] = {}
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        try:
            context = context_text(folder.name.replace(joint_separator, "+"), observational_name)
        except ValueError as error:
            raise UserValueError(f"Folder {str(folder)!r}: {error} Rename the folder.") from error
        if context in folders:
            raise UserValueError(
                f"The folders {folders[context].name!r} and {folder.name!r} in {str(root)!r} are the same context. "
                f"Put their {held} into one."
            )
        folders[context] = folder
    if not folders:
        raise UserValueError(
            f"{str(root)!r} has no folders. It must hold one folder of {held} per context, such as "
            f"'{observational_name}', 'thick' and 'thick+slant'."
        )
    return folders


def visible_files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Files of these suffixes in a folder and below it, but none that is hidden, in any order."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in suffixes and not hidden and path.is_file():
            yield path


def _images(folder: Path) -> list[Path]:
    images = sorted(visible_files(folder, IMAGE_SUFFIXES))
    if not images:
        raise UserValueError(
            f"The folder {str(folder)!r} has no images. Allowed are the formats of Pillow, such as .png and .jpg. "
            "Add images, or remove the folder."
        )
    return images


def _captions(folder: Path, images: list[Path]) -> list[str]:
    captions: dict[Path, str] = {}
    known = set(images)
    # Bytes, because text mode would also end lines where Unicode does.
    for number, raw in enumerate((folder / METADATA).read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"Line {number} of {str(folder / METADATA)!r}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            entry = json.loads(line)
        except UnicodeDecodeError as error:
            raise UserValueError(f"{where} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None
        except (ValueError, RecursionError) as error:  # too many digits, too many brackets
            raise UserValueError(f"{where} is not JSON ({error}). Write one object per line.") from None
        name, text = (entry.get("file_name"), entry.get("text")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserValueError(f'{where} must be {{"file_name": "...", "text": "..."}}; received {short_repr(line)}.')
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserValueError(f"{where}: the text holds half a character. Correct it.")
        relative = os.path.normpath(name)
        # Judged by name, not resolved: images that are links, as in the cache of the Hub, are the user's own.
        if os.path.isabs(relative) or relative.split(os.sep)[0] == os.pardir:
            raise UserValueError(
                f"{where}: file_name {short_repr(name)} leaves the folder. Only images inside it can be named."
            )
        path = folder / relative
        if path not in known:
            raise FileNotFoundError(f"{where}: there is no image {short_repr(name)} in the folder. Correct file_name.")
        if path in captions:
            raise UserValueError(f"{where}: {name!r} has a second caption. Keep one line per image.")
        captions[path] = text
    if missing := [path for path in images if path not in captions]:
        raise UserValueError(
            f"{str(folder / METADATA)!r} has no caption for {_listed(missing)}. Add a line for each, or remove the "
            "images."
        )
    return [captions[path] for path in images]


def _listed(paths: Sequence[Path], limit: int = 5) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return quoted(path.name for path in paths[:limit]) + more
