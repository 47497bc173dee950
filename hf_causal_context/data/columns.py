"""Computed text columns, without decoding or rewriting the others: images are large, contexts are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, Video
from pyarrow import ArrowInvalid

from ..errors import UserTypeError, UserValueError
from ..messages.wording import quoted

Rows: TypeAlias = Dataset | IterableDataset

BATCH_ROWS = 1000
# Rows of a stream bring their images along.
STREAM_BATCH_ROWS = 100


def known_features(dataset: object) -> tuple[Rows, Features]:
    """Return the dataset with its features; a stream without declared features is asked for its first rows.

    Raises:
        TypeError: for anything but one split of a dataset.
        ValueError: for a stream without rows, or with files that cannot be read.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        splits = f" Choose one of its splits: {quoted(map(str, dataset))}." if isinstance(dataset, dict) else ""
        raise UserTypeError(
            f"{type(dataset).__name__} is not a dataset. Allowed: a datasets.Dataset or IterableDataset.{splits}"
        )
    if isinstance(dataset, IterableDataset) and dataset.features is None:
        try:
            dataset = dataset._resolve_features()
        except StopIteration:
            raise UserValueError(
                "The streaming dataset has no rows. Check its files, or the filters before it."
            ) from None
        except ArrowInvalid as error:
            raise UserValueError(f"The first rows of the streaming dataset cannot be read: {error}") from error
    assert dataset.features is not None
    return dataset, dataset.features


def unformatted(dataset: Rows) -> Rows:
    """Return a dataset that yields images and Python's values of all columns, as whatever it was formatted or saved.

    A transform of the user's own is kept.
    """
    if isinstance(dataset, IterableDataset):
        return dataset if dataset._formatting is None else dataset.with_format(None)
    formatted = dataset.format["type"] not in (None, "custom") or dataset.format["columns"] != dataset.column_names
    return dataset.with_format(None) if formatted else dataset


def require_columns(features: Features, columns: dict[str, str]) -> None:
    """Check that columns exist; `columns` maps each to what asked for it.

    Raises:
        ValueError: for a missing column.
    """
    for column, reason in columns.items():
        if column not in features:
            raise UserValueError(
                f"The dataset has no column {column!r} ({reason}). Its columns: {quoted(features)}. "
                "Name one of them, or add the column."
            )


def require_images(features: Features, column: str) -> None:
    """Check that a column holds images or videos; one that is missing is left to `require_columns`.

    Raises:
        ValueError: for something else.
    """
    feature = features.get(column)
    if feature is not None and not isinstance(feature, Image | Video):
        raise UserValueError(
            f"The column {column!r} holds {feature}, not images. Name another --image_column, or cast it: "
            "dataset.cast_column(name, datasets.Image())."
        )


def has_no_label(feature: object, value: object) -> bool:
    """Whether a value is the number that class labels have where nobody gave one: the names' last, to Python."""
    return isinstance(feature, ClassLabel) and value == -1


def with_text_column(dataset: Rows, name: str, inputs: Sequence[str], text: Callable[..., str]) -> Rows:
    """Add or replace the column `name` by `text(*inputs)` of each row.

    Raises:
        ValueError, TypeError: what `text` raises, with the row's number in front; while iterating, for a stream.
    """
    inputs = list(inputs)

    def numbered_text(row: int, values: Sequence[Any]) -> str:
        try:
            return text(*values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Row {row}: {error}") from error

    dataset, features = known_features(dataset)
    text_feature = {name: Value("string")}
    if isinstance(dataset, IterableDataset):
        with_text = dataset.decode(False).map(
            lambda *columns: {name: [numbered_text(row[-1], row[:-1]) for row in zip(*columns, strict=True)]},
            with_indices=True,
            input_columns=inputs,
            batched=True,
            batch_size=STREAM_BATCH_ROWS,
        )
        # Declared afterwards: map(features=...) would leave the images undecoded for good.
        return with_text.cast(Features({**features, **text_feature}))

    rows = _tuples(dataset.with_format(None).select_columns(inputs))
    texts = [numbered_text(number, row) for number, row in enumerate(rows)]
    if name in features:
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, texts, feature=text_feature[name])


def _tuples(dataset: Dataset) -> Iterator[tuple[Any, ...]]:
    for batch in dataset.iter(BATCH_ROWS):
        assert isinstance(batch, dict)
        yield from zip(*(batch[column] for column in dataset.column_names), strict=True)


def of_contexts(stream: IterableDataset, contexts: Sequence[str]) -> IterableDataset:
    """Return the rows of a stream whose "context" is one of `contexts`."""
    return stream.filter(
        lambda values: [value in contexts for value in values],
        input_columns="context",
        batched=True,
        batch_size=STREAM_BATCH_ROWS,
    )
