"""Folders of images or videos, one per context: ``root/obs``, ``root/thick``, ``root/thick+slant``."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value, Video
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .._files import in_one_spelling
from ..contexts import ConceptSet, ContextLike, context_text
from ..errors import UserValueError
from ..media.videos import VIDEO_SUFFIXES, video_package
from ..messages.wording import quoted
from .captions import METADATA, read_captions, stem_of
from .interventional import InterventionalData, from_dataset
from .masks import is_mask, masks_of

IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS) - VIDEO_SUFFIXES  # datasets has .mpeg and .mpg among both


def load_folders(
    root: str | Path,
    *,
    concepts: Sequence[str] | ConceptSet | None = None,
    observational_name: str = "obs",
    joint_separator: str = "+",
    held_out_contexts: Iterable[ContextLike] = (),
    training_contexts: Iterable[ContextLike] | None = None,
    caption_column: str | None = None,
    frame_folders: bool = False,
    paired_files: bool = False,
    streaming: bool = False,
) -> InterventionalData:
    """Read one folder per context, named as `Context.parse` reads them; `observational_name` is the observational one.

    A folder "thick=0.5" holds rows at that strength.

    Files of videos are rows beside images; where there are some, the rows have the column "video". With
    `frame_folders`, a folder of images inside of a context's folder is a video, one image per frame.

    With a `joint_separator` such as "-", "thick-slant" is read as "thick+slant"; no concept's name may contain it.

    Captions are optional, for all images or for none. They stand in a ``metadata.jsonl`` or ``metadata.csv`` with
    ``file_name`` and ``text`` (or ``caption``, or `caption_column`), in `root` or in a folder of images; or beside each
    image, in a ``.txt`` or ``.caption`` of the same name. Masks are optional, too, for any of the images: see
    `masks_of`. With `paired_files`, files of the same name in several contexts show one sample. Files that are not read
    are counted in the warnings. Images are opened when they are used. What is trained on and what is held out: see
    `from_dataset`.

    Raises:
        FileNotFoundError: for a missing root, or an image that the metadata names and that does not exist.
        ValueError: for no folders, folders without images, two folders of one context, bad metadata, captions of some
            images only, and what `from_dataset` raises.
    """
    if paired_files and streaming:
        raise UserValueError(
            "paired_files= looks for rows of one sample, which a stream does not find. Leave it out, or do not stream."
        )
    root = Path(root)
    folders = context_folders(root, observational_name, joint_separator, "images")
    files = {context: sorted(visible_files(folder)) for context, folder in folders.items()}
    images = {context: _images(folders[context], own, frame_folders) for context, own in files.items()}
    captionable = {image for own in images.values() for image in own}
    _check_frames(captionable, (file for own in files.values() for file in own))
    masks = masks_of(captionable, (file for own in files.values() for file in own if is_mask(file)))
    read = captionable.union(masks.values())
    others = [file for own in [files_in(root), *files.values()] for file in own if read.isdisjoint((file, file.parent))]
    captions, caption_files = read_captions(others, captionable, caption_column)
    if captions:
        _check_all_captioned(folders, images, captions)
    elif caption_column is not None:
        raise UserValueError(
            f"caption_column={caption_column!r} was given, but {str(root)!r} has no metadata with captions. Add a "
            f"{METADATA[0]}, or leave it out."
        )

    rows = _table(images, captions, masks, folders if paired_files else {})
    data = from_dataset(
        rows,
        concepts=concepts,
        content_column=rows.column_names[0],
        caption_column="caption" if captions else None,
        mask_column="mask" if masks else None,
        pair_column="pair" if paired_files else None,
        observational_name=observational_name,
        held_out_contexts=held_out_contexts,
        training_contexts=training_contexts,
    )
    warnings = [*data.warnings, *skipped([file for file in others if file not in caption_files], root)]
    warnings += merged({folders[context]: own for context, own in images.items()})
    if masks and len(masks) < len(captionable):
        warnings.append(f"{len(masks)} of {len(captionable)} images have a mask. Of the others, all counts.")
    data = replace(data, warnings=tuple(warnings))
    if not streaming:
        return data
    assert isinstance(data.rows, Dataset)
    held_out = {context: rows.to_iterable_dataset() for context, rows in data.held_out.items()}  # type: ignore[union-attr]
    return replace(data, rows=data.rows.to_iterable_dataset(), held_out=held_out)


def _check_frames(clips: Collection[Path], files: Iterable[Path]) -> None:
    """Refuse other files than images in the folder of a clip."""
    for file in files:
        if file.parent in clips and file.suffix.lower() not in IMAGE_SUFFIXES:
            raise UserValueError(
                f"{str(file)!r} lies among the frames of a clip, and is no image. Remove it; a caption of the clip "
                f"lies beside its folder, as {file.parent.name + '.txt'!r}."
            )


def _table(
    images: Mapping[str, Sequence[Path]],
    captions: Mapping[Path, str],
    masks: Mapping[Path, Path],
    paired_in: Mapping[str, Path],
) -> Dataset:
    """Return a row for each image or video of each context, its content first.

    `paired_in` are the folders of the contexts where files of the same name show one sample, else nothing.
    """
    paths = [image for own in images.values() for image in own]
    if videos := any(path.suffix.lower() in VIDEO_SUFFIXES for path in paths):
        video_package()
    content = "video" if videos or any(path.is_dir() for path in paths) else "image"
    columns: dict[str, list[Any]] = {
        content: [str(image) for image in paths],
        "context": [context for context, own in images.items() for _ in own],
    }
    if captions:
        columns["caption"] = [captions[image] for image in paths]
    if masks:
        columns["mask"] = [str(masks[image]) if image in masks else None for image in paths]
    if paired_in:
        columns["pair"] = [
            in_one_spelling(stem_of(image).relative_to(paired_in[context]).as_posix())
            for context, own in images.items()
            for image in own
        ]
    media = {"image": Image(), "video": Video(decode=False), "mask": Image()}
    return Dataset.from_dict(columns, features=Features({name: media.get(name, Value("string")) for name in columns}))


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
            # A strength may hold the separator, as its sign or its exponent's.
            strength = r"(=[-+]?\d*\.?\d+(?:e[-+]?\d+)?)"
            name = re.sub(f"{strength}|{re.escape(joint_separator)}", lambda m: m[1] or "+", folder.name, flags=re.I)
            context = context_text(name, observational_name)
        except ValueError as error:
            raise UserValueError(f"Folder {str(folder)!r}: {error} Rename the folder.") from error
        if context in folders:
            raise UserValueError(
                f"The folders {folders[context].name!r} and {folder.name!r} in {str(root)!r} are the same context. "
                f"Put their {held} into one."
            )
        folders[context] = folder
    if not folders:
        above = f" If its files are one context, give the folder above it: {str(root.resolve().parent)!r}."
        raise UserValueError(
            f"{str(root)!r} has no folders. It must hold one folder of {held} per context, such as "
            f"'{observational_name}', 'thick' and 'thick+slant'.{above if any(files_in(root)) else ''}"
        )
    return folders


def visible_files(folder: Path, suffixes: Collection[str] | None = None) -> Iterator[Path]:
    """Files (of these suffixes) in a folder and below it, but none that is hidden, in any order.

    Links that lead nowhere, or to folders, which are not entered, count as files: what is skipped is named.

    Nothing is found where there is no folder.

    Raises:
        OSError: for a folder that cannot be read, whose files would be missing.
        ValueError: for a name that is no text, which tables do not hold.
    """
    for place, folders, names in os.walk(folder, onerror=_stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in [*folders, *names] if not name.startswith(".")):
            fits = suffixes is None or path.suffix.lower() in suffixes
            if fits and (path.is_file() or path.is_symlink()):
                yield _named_as_text(path)


def _named_as_text(path: Path) -> Path:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise UserValueError(f"The name of the file {str(path)!a} is not UTF-8. Rename it.") from None
    return path


def _stop(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def skipped(files: Sequence[Path], root: Path) -> Iterator[str]:
    """Say which files are not read, if there are any: their number and a first one, for each suffix."""
    by_suffix: defaultdict[str, list[str]] = defaultdict(list)
    for file in sorted(files):
        by_suffix[file.suffix.lower()].append(str(file.relative_to(root)))
    if files:
        listed = ", ".join(
            f"{len(names)} {suffix or 'without a suffix'} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for suffix, names in by_suffix.items()
        )
        yield f"Files that are not read: {listed}."


def merged(read: Mapping[Path, Sequence[Path]]) -> Iterator[str]:
    """Say which sub-folders are read as a part of their folder, if there are any; `read` is folder -> files in use."""
    inner = {
        folder: sorted({str(file.parent.relative_to(folder)) for file in files if file.parent != folder})
        for folder, files in read.items()
    }
    if listed := "; ".join(f"{folder.name}: {', '.join(names)}" for folder, names in inner.items() if names):
        yield f"Sub-folders are read as part of their context ({listed}). Where they are contexts, put them beside it."


def files_in(root: Path) -> Iterator[Path]:
    """Files in a folder that are not hidden, and none below it."""
    return (path for path in sorted(root.iterdir()) if path.is_file() and not path.name.startswith("."))


def _images(folder: Path, files: Sequence[Path], frame_folders: bool) -> list[Path]:
    """Images and videos; folders of frames in place of the images in them."""
    allowed = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    images = [file for file in files if file.suffix.lower() in allowed and not is_mask(file)]
    if frame_folders:
        inside = (f if f.parent == folder or f.suffix.lower() in VIDEO_SUFFIXES else f.parent for f in images)
        images = list(dict.fromkeys(inside))
    if not images:
        raise UserValueError(
            " ".join(
                [
                    f"The folder {str(folder)!r} has no images.",
                    *skipped(files, folder),
                    "Allowed are the formats of Pillow, such as .png and .jpg, and videos, such as .mp4. Add images, "
                    "or remove the folder.",
                ]
            )
        )
    return images


def _check_all_captioned(folders: dict[str, Path], images: dict[str, list[Path]], captions: Collection[Path]) -> None:
    without = {context: [image for image in own if image not in captions] for context, own in images.items()}
    if none := [folders[context] for context, own in without.items() if own == images[context]]:
        raise UserValueError(
            f"{_listed(none)} has no captions, while other folders have. Caption every folder, or none."
        )
    for context, missing in without.items():
        if missing:
            raise UserValueError(
                f"{str(folders[context])!r} has no caption for {_listed(missing)}. Add one for each, or remove the "
                "images."
            )


def _listed(paths: Sequence[Path], limit: int = 5) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return quoted(path.name for path in paths[:limit]) + more
