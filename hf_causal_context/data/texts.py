"""Interventional texts: folders of files, one per context, and datasets with a context column."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from ..contexts import ConceptSet, ContextLike
from ..errors import UserValueError
from ..messages.wording import quoted
from .captions import METADATA
from .columns import Rows, known_features, require_columns
from .folders import context_folders, files_in, merged, skipped, visible_files
from .interventional import InterventionalData, from_dataset
from .text_rows import (
    TEXT_SUFFIXES,
    TextFile,
    holds_messages,
    is_text,
    read_texts,
    row_features,
    text_columns,
    told_unread,
)

_PIECE_ROWS = 10_000


def load_text_folders(
    root: str | Path,
    *,
    concepts: Sequence[str] | ConceptSet | None = None,
    observational_name: str = "obs",
    joint_separator: str = "+",
    held_out_contexts: Iterable[ContextLike] = (),
    training_contexts: Iterable[ContextLike] | None = None,
    streaming: bool = False,
) -> InterventionalData:
    """Read one folder of texts per context; folders are named as for `load_folders`.

    Each ``.txt`` holds one text per line, each ``.jsonl`` (but ``metadata.jsonl``, which is for images) one object
    per line: ``{"text"}``, ``{"prompt", "completion"}`` or ``{"messages"}``, the latter with ``role`` and ``content``;
    prompts and completions may be lists of messages, too. Other keys are ignored. All rows must have one shape.

    With `streaming`, all but the first row of each file is read and checked when it is used.

    Raises:
        FileNotFoundError: for a missing root.
        ValueError: for no folders, folders or files without texts, two folders of one context, a bad line (with file
            and number), rows of different shapes, and what `from_dataset` raises.
    """
    root = Path(root)
    folders = context_folders(root, observational_name, joint_separator, "texts")
    found = {context: sorted(visible_files(folder)) for context, folder in folders.items()}
    texts = {context: _texts_of(folders[context], files) for context, files in found.items()}
    places = [(str(file), context) for context, own in texts.items() for file in own]
    others = [file for files in (files_in(root), *found.values()) for file in files if not _is_text(file)]
    unread: set[str] = set()  # keys of messages
    features = _common_features([file for file, _ in places], unread)
    # Contexts are told apart and checked before the texts are read: file by file instead of row by row.
    files = from_dataset(
        Dataset.from_dict({"text": [file for file, _ in places], "context": [context for _, context in places]}),
        concepts=concepts,
        content_column="text",
        observational_name=observational_name,
        held_out_contexts=held_out_contexts,
        training_contexts=training_contexts,
    )
    lines: dict[str, list[int]] = {}
    read = partial(_streamed if streaming else partial(_read, lines=lines, unread=unread), features=features)
    rows, held_out = read(files.rows), {context: read(chosen) for context, chosen in files.held_out.items()}
    inside = merged({folders[context]: own for context, own in texts.items()})
    return replace(
        files,
        rows=rows,
        held_out=held_out,
        counts=dict(Counter(rows["context"][:])) if isinstance(rows, Dataset) else None,
        warnings=(*files.warnings, *skipped(others, root), *inside, *told_unread(unread)),
        content_column=next(iter(features)),
        files={context: [TextFile(file, lines.get(str(file))) for file in own] for context, own in texts.items()},
    )


def texts_from_dataset(
    dataset: Rows,
    *,
    text_column: str = "text",
    concepts: Sequence[str] | ConceptSet | None = None,
    context_column: str = "context",
    observational_name: str = "obs",
    held_out_contexts: Iterable[ContextLike] = (),
    training_contexts: Iterable[ContextLike] | None = None,
) -> InterventionalData:
    """Read a dataset of texts; contexts, concepts and streams are those of `from_dataset`.

    The texts are in the column "messages", else in "prompt" and "completion", else in `text_column`, which is renamed
    to "text".

    Raises:
        TypeError, ValueError: for columns that are missing, hold something else or would not be read, and what
            `from_dataset` raises.
    """
    dataset, features = known_features(dataset)
    columns = text_columns(features)
    if columns in ((), ("text",)):
        columns = (text_column,)
        require_columns(features, {text_column: "text_column=; or 'messages', or 'prompt' and 'completion'"})
    elif text_column not in ("text", *columns):
        raise UserValueError(
            f"text_column={text_column!r} would have no effect, since the dataset has {quoted(columns)}, which is read "
            "first. Leave it out, or remove that from the dataset: dataset.remove_columns(...)."
        )
    _check_features(features, columns)
    data = from_dataset(
        dataset,
        concepts=concepts,
        context_column=context_column,
        content_column=columns[0],
        observational_name=observational_name,
        held_out_contexts=held_out_contexts,
        training_contexts=training_contexts,
    )
    if columns != (text_column,) or text_column == "text":
        return data
    return replace(
        data,
        rows=_renamed(data.rows, text_column),
        held_out={context: _renamed(rows, text_column) for context, rows in data.held_out.items()},
        content_column="text",
    )


def _is_text(file: Path) -> bool:
    return file.suffix.lower() in TEXT_SUFFIXES and file.name not in METADATA


def _texts_of(folder: Path, files: Sequence[Path]) -> list[Path]:
    texts = [file for file in files if _is_text(file)]
    if not texts:
        raise UserValueError(
            f"The folder {str(folder)!r} has no texts. Allowed are .txt, with one text per line, and .jsonl, with one "
            f"object per line, but not {METADATA[0]}. Add texts, or remove the folder."
        )
    return texts


def _common_features(files: list[str], unread: set[str]) -> Features:
    """Return the shape of the first row of each file."""
    expected = Features()
    for file in files:
        line, row = next(read_texts(Path(file), unread), (0, {}))
        if not row:
            raise UserValueError(f"The file {file!r} has no texts. Add some, or remove it.")
        expected = expected or row_features(row)
        _check_shape(row, expected, line, file, files[0])
    return expected


def _check_shape(row: dict[str, Any], expected: Features, line: int, file: str, first: str) -> None:
    if (found := row_features(row)) != expected:
        raise UserValueError(
            f"Line {line} of {file!r} has {_shape(found)}, but {first!r} has {_shape(expected)}. All rows must have "
            "one shape: change one of the two."
        )


def _shape(features: Features) -> str:
    kind = "lists of messages" if not is_text(next(iter(features.values()))) else "text"
    return f"{' and '.join(map(repr, features))} ({kind})"


def _streamed(files: Rows, features: Features) -> Rows:
    chosen = _chosen(files)
    given = {"files": chosen, "expected": features, "first": chosen[0][0]}
    return IterableDataset.from_generator(_rows, features=_with_context(features), gen_kwargs=given)


def _read(files: Rows, features: Features, lines: dict[str, list[int]], unread: set[str]) -> Rows:
    """Return all rows; the numbers of their lines go into `lines`, and keys that are not read into `unread`."""
    chosen = _chosen(files)
    rows = _rows(chosen, features, chosen[0][0], lines, unread)
    # Piece by piece: as Python objects, texts take several times the memory.
    pieces = iter(lambda: list(itertools.islice(rows, _PIECE_ROWS)), [])
    return concatenate_datasets([Dataset.from_list(piece, features=_with_context(features)) for piece in pieces])


def _chosen(files: Rows) -> list[tuple[str, str]]:
    assert isinstance(files, Dataset)
    return list(zip(files["text"][:], files["context"][:], strict=True))


def _with_context(features: Features) -> Features:
    return Features({**features, "context": Value("string")})


def _rows(
    files: list[tuple[str, str]],
    expected: Features,
    first: str,
    lines: dict[str, list[int]] | None = None,
    unread: set[str] | None = None,
) -> Iterator[dict[str, Any]]:
    for file, context in files:
        for line, row in read_texts(Path(file), unread):
            _check_shape(row, expected, line, file, first)
            if lines is not None:
                lines.setdefault(file, []).append(line)
            yield {**row, "context": context}


def _check_features(features: Features, columns: tuple[str, ...]) -> None:
    texts = all(is_text(features[column]) for column in columns)
    messages = all(holds_messages(features[column]) for column in columns)
    if columns == ("messages",):
        fits, allowed = messages, "a list of messages, each with 'role' and 'content'. Map it first."
    elif len(columns) > 1:
        fits, allowed = texts or messages, "both one text per row, or both a list of messages. Map them first."
    else:
        fits, allowed = texts, "one text per row. Name another with text_column=, or map it first."
    if not fits:
        held = " and ".join(f"{column!r} holds {features[column]}" for column in columns)
        raise UserValueError(f"The column {held}; it must hold {allowed}")


def _renamed(rows: Rows, text_column: str) -> Rows:
    if "text" in (rows.column_names or ()):
        rows = rows.remove_columns("text")
    return rows.rename_column(text_column, "text")
