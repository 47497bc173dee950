"""Interventional data: an observational set and one set per concept, in the columns of one dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Value,
    Video,
)
from numpy.typing import NDArray

from ..contexts import ConceptSet, Context, ContextLike, context_text, refuse_obs
from ..errors import UserTypeError, UserValueError
from ..messages.wording import nearest, quoted
from .columns import (
    STREAM_BATCH_ROWS,
    Rows,
    has_no_label,
    known_features,
    of_contexts,
    require_columns,
    unformatted,
    with_text_column,
)
from .found_names import check_found_names
from .pairs import check_names, name_of
from .text_rows import TextFile, is_text

# What the columns of our names hold.
_MEANINGS = {"context": "contexts", "caption": "captions", "mask": "masks", "pair": "names of samples"}


@dataclass
class InterventionalData:
    """Rows to train on and rows to evaluate on, each with the context it was drawn from.

    `rows` have the columns `content_column` (images; or "text", "messages" or, next to "completion", "prompt": see
    `texts_from_dataset`), "context" (the printed form of a `Context`, "" is observational), "caption" and "mask" if
    there are captions and masks, and whatever else the dataset had. `contexts` are those of `rows`, sorted. `held_out`
    maps contexts to rows that are never trained on. `counts` are the rows per training context, None where a stream
    does not tell. `reweighted` maps combinations to the numbers of rows that stand for them in training. `files` maps
    contexts to the files whose lines are their rows, in this order; it is empty where there are none.
    """

    rows: Rows
    concepts: ConceptSet
    contexts: tuple[str, ...]
    held_out: dict[str, Rows]
    counts: dict[str, int] | None
    content_column: str = "image"
    warnings: tuple[str, ...] = ()
    reweighted: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    files: dict[str, list[TextFile]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_obs(self.concepts)

    @property
    def streaming(self) -> bool:
        """Whether the rows are read one after the other instead of by number."""
        return isinstance(self.rows, IterableDataset)

    @property
    def has_captions(self) -> bool:
        """Whether the rows have the column "caption"."""
        return "caption" in (self.rows.column_names or ())

    @property
    def has_videos(self) -> bool:
        """Whether the content is clips: files with videos, or folders with one image per frame."""
        return isinstance((self.rows.features or {}).get(self.content_column), Video)

    @property
    def has_masks(self) -> bool:
        """Whether the rows have the column "mask": images of what counts in the loss, or None where all of it does."""
        return "mask" in (self.rows.column_names or ())

    @property
    def has_pairs(self) -> bool:
        """Whether the rows have the column "pair": one name for the rows of one sample, "" for rows without others."""
        return "pair" in (self.rows.column_names or ())


def from_dataset(
    dataset: Rows,
    *,
    concepts: Sequence[str] | ConceptSet | None = None,
    context_column: str = "context",
    content_column: str = "image",
    caption_column: str | None = None,
    mask_column: str | None = None,
    pair_column: str | None = None,
    observational_name: str = "obs",
    held_out_contexts: Iterable[ContextLike] = (),
    training_contexts: Iterable[ContextLike] | None = None,
) -> InterventionalData:
    """Read a dataset, map-style or streaming, with a context column.

    A context is text such as ``"thick+slant"`` or ``"thick=0.5"``, a list of names, a mapping name -> strength (None is
    not intervened) or a class label with such a name; `observational_name` and ``""`` are observational. `concepts`
    default to those that are the only target of a context, in alphabetical order. Trained on are `training_contexts`,
    by default the observational one and all with one target; the others, which include all in `held_out_contexts`, are
    held out. Rows of several contexts with the same text or number in the `pair_column` show one sample.

    A stream is not searched for its contexts: it needs `concepts`, yields the training contexts and those named as held
    out, and skips other rows.

    Raises:
        TypeError: for a dataset dictionary, or a context of another type.
        ValueError: for missing columns, unknown concepts, named contexts without rows, a context both trained on and
            held out, or no rows to train on.
    """
    dataset, features = known_features(dataset)
    dataset = unformatted(dataset)
    named = {"context": context_column, "caption": caption_column, "mask": mask_column, "pair": pair_column}
    _check_columns(features, content_column, named)
    if pair_column is not None and isinstance(dataset, IterableDataset):
        raise UserValueError(
            f"pair_column={pair_column!r} looks for rows of one sample, which a stream does not find. Leave it out, or "
            "do not stream."
        )
    dataset = _as_stored(dataset, [content_column, *([mask_column] if mask_column is not None else [])])
    _, features = known_features(dataset)
    known = None if concepts is None else _concept_set(concepts)
    if known is not None and observational_name in known:
        raise UserValueError(
            f"The concept {observational_name!r} has the name of the observational context. Rename the concept, or "
            "choose another observational_name=."
        )
    named_training = None if training_contexts is None else _named(training_contexts, observational_name)
    named_held_out = _named(held_out_contexts, observational_name)

    read = _context_reader(features[context_column], observational_name, known)
    undecoded = dataset.decode(False) if isinstance(dataset, IterableDataset) else dataset
    rows = with_text_column(undecoded, "context", [context_column], read)
    _check_captions(features, caption_column)
    if context_column != "context":
        rows = rows.remove_columns(context_column)
    others = Features({column: feature for column, feature in features.items() if column != context_column})
    rows = _renamed(rows, others, caption_column, "caption", content_column)
    rows = _renamed(rows, others, mask_column, "mask", content_column)
    if pair_column is not None:
        rows = with_text_column(rows, "pair", [pair_column], name_of)
    else:
        rows = _renamed(rows, others, None, "pair", content_column)

    if isinstance(rows, IterableDataset):
        _, plain = known_features(rows)
        known_before = {column: features[column] for column in plain if column not in ("context", "caption", "mask")}
        masks = {"mask": features[mask_column]} if mask_column is not None else {}
        restored = Features({**plain, **known_before, **masks})
        return _stream_data(rows, restored, known, named_training, named_held_out, content_column)
    return _table_data(rows, known, named_training, named_held_out, content_column, observational_name)


def _check_columns(features: Features, content_column: str, named: Mapping[str, str | None]) -> None:
    """Refuse columns that are missing, hold something else, or have two uses.

    Args:
        features: of the dataset.
        content_column: the column with what is trained on.
        named: our name for each other column that is read -> its name in the dataset, None where there is none.
    """
    given = {"context": named["context"], "content": content_column, **named}
    asked = [(column, f"{name}_column=") for name, column in given.items() if column is not None]
    columns = dict(asked)
    require_columns(features, columns)
    if len(columns) < len(asked):
        raise UserValueError(
            "context_column=, content_column=, pair_column=, caption_column= and mask_column= must be different "
            "columns."
        )
    if (mask_column := named["mask"]) is not None and not isinstance(features[mask_column], Image):
        raise UserValueError(
            f"The column {mask_column!r} holds {features[mask_column]}, not masks. Name another mask_column=, or cast "
            "it: dataset.cast_column(name, datasets.Image())."
        )
    if (pair_column := named["pair"]) is not None:
        check_names(features, pair_column)
    if content_column != "context" and is_text(features[content_column]):
        del columns[content_column]  # texts get another name afterwards
    for name, own in named.items():
        if name in columns and name not in (own, named["context"]):
            raise UserValueError(
                f"The column {name!r} was named as {columns[name]}, and a column {name!r} is for {_MEANINGS[name]}. "
                f"Rename it: dataset.rename_column({name!r}, ...)."
            )


def _as_stored(dataset: Rows, columns: Iterable[str]) -> Rows:
    """Return a dataset whose images are decoded as their files have them, and whose videos are not decoded yet."""
    for column in columns:
        _, features = known_features(dataset)
        feature = features[column]
        if isinstance(feature, Video):  # decoded when read, without another package than for files
            dataset = dataset.cast_column(column, Video(decode=False))
        # The mode "RGB" would make 16 bits white before they are read.
        elif isinstance(feature, Image) and (feature.mode == "RGB" or not feature.decode):
            dataset = dataset.cast_column(column, Image(mode=None if feature.mode == "RGB" else feature.mode))
    return dataset


def _concept_set(concepts: Sequence[str] | ConceptSet) -> ConceptSet:
    return concepts if isinstance(concepts, ConceptSet) else ConceptSet(cast(tuple[str, ...], concepts))


def _named(contexts: Iterable[ContextLike], observational_name: str) -> set[str]:
    if isinstance(contexts, str):
        raise UserTypeError(f"{contexts!r} must be a list of contexts, such as ['thick+slant'].")
    return {context_text(context, observational_name) for context in contexts}


def _context_reader(feature: object, observational_name: str, known: ConceptSet | None) -> Callable[[Any], str]:
    texts: dict[object, str] = {}

    def read(value: object) -> str:
        if has_no_label(feature, value):
            value = None
        if isinstance(feature, ClassLabel) and isinstance(value, int):
            value = feature.names[value]
        if isinstance(value, str) and value in texts:
            return texts[value]
        text = context_text(value, observational_name)
        if known is not None:
            for target in Context.parse(text).targets:
                _check_named(target, text, known)
        if isinstance(value, str):
            texts[value] = text
        return text

    return read


def _check_named(target: str, context: str, known: ConceptSet) -> None:
    try:
        known.index(target, where=f"context {context!r}")
    except UserValueError as error:
        if not nearest(target, known):
            raise
        raise UserValueError(
            f"{error} The data says {target!r}, and concepts= does not: one of the two is misspelled."
        ) from None


def _check_captions(features: Features, caption_column: str | None) -> None:
    if caption_column is not None:
        feature = features[caption_column]
        if not isinstance(feature, Value) or "string" not in feature.dtype:
            raise UserValueError(
                f"The caption column {caption_column!r} holds {feature}; it must hold one text per row. Map it first."
            )


def _renamed(rows: Rows, features: Features, column: str | None, name: str, content_column: str) -> Rows:
    """Return the rows with a column under our name for it, which no other column has."""
    if name in (column, content_column):
        return rows
    if name in features:
        rows = rows.remove_columns(name)
    return rows if column is None else rows.rename_column(column, name)


def _single_concepts(contexts: Sequence[str], observational_name: str) -> ConceptSet:
    targets = {Context.parse(context).targets for context in contexts}
    singles = sorted(names[0] for names in targets if len(names) == 1)
    if not singles:
        raise UserValueError(
            f"No context has exactly one target, so the concepts are unknown. Contexts found: {quoted(contexts)}. "
            "Add a set for every single concept, or name them with concepts=."
        )
    check_found_names(singles, observational_name, "" in contexts)
    for context in contexts:
        for target in Context.parse(context).targets:
            if target not in singles:
                raise UserValueError(
                    f"The context {context!r} names {target!r}, and there is no set of {target!r} alone, from which a "
                    f"concept is known. Concepts found: {quoted(singles)}.{nearest(target, singles)} Correct the name, "
                    "or add a set in which only that was intervened on."
                )
    return ConceptSet(tuple(singles))


def _table_data(
    rows: Dataset,
    known: ConceptSet | None,
    training: set[str] | None,
    held_out: set[str],
    content_column: str,
    observational_name: str,
) -> InterventionalData:
    row_contexts = np.array(rows["context"][:], dtype=object)
    counts = Counter(row_contexts.tolist())
    for argument, named in (("held_out_contexts", held_out), ("training_contexts", training or set())):
        if missing := sorted(named - set(counts)):
            raise UserValueError(
                f"{argument}= names {quoted(missing)}, which has no rows. Contexts found: {quoted(sorted(counts))} "
                "('' is observational). Correct the name, or add the rows."
            )
    concepts = known or _single_concepts(sorted(counts), observational_name)
    trained, kept_out = _partition(set(counts), concepts, training, held_out)
    return InterventionalData(
        rows=rows.select(np.flatnonzero(np.isin(row_contexts, trained))) if kept_out else rows,
        concepts=concepts,
        contexts=trained,
        held_out={context: rows.select(np.flatnonzero(row_contexts == context)) for context in kept_out},
        counts={context: counts[context] for context in trained},
        content_column=content_column,
    )


def _stream_data(
    rows: IterableDataset,
    features: Features,
    concepts: ConceptSet | None,
    training: set[str] | None,
    held_out: set[str],
    content_column: str,
) -> InterventionalData:
    if concepts is None:
        raise UserValueError(
            "A streaming dataset needs concepts=: finding them would mean to read all of it. Name them in order."
        )
    found = held_out | ({"", *concepts} if training is None else training)
    trained, kept_out = _partition(found, concepts, training, held_out)
    # map() forgets the features, so that filters pass rows as they are; declared last, images are decoded last.
    plain = rows.map(batched=True, batch_size=STREAM_BATCH_ROWS)
    return InterventionalData(
        rows=of_contexts(plain, trained).cast(features),
        concepts=concepts,
        contexts=trained,
        held_out={context: of_contexts(plain, (context,)).cast(features) for context in kept_out},
        counts=None,
        content_column=content_column,
        warnings=(
            f"Streaming: only rows of the contexts {quoted(trained)} are trained on; other rows are skipped, those at "
            "other strengths, too. Name further contexts, such as 'thick=0.5', in training_contexts= or "
            "held_out_contexts=.",
        ),
    )


def _partition(
    found: set[str], concepts: ConceptSet, training: set[str] | None, held_out: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for context in sorted(found):
        for target in Context.parse(context).targets:
            concepts.index(target, where=f"context {context!r}")
    if training is None:
        training = {context for context in found if len(Context.parse(context).targets) < 2} - held_out
    if both := sorted(training & held_out):
        raise UserValueError(f"{quoted(both)} cannot be both trained on and held out. Remove it from one of the lists.")
    if not training:
        raise UserValueError(
            f"No rows to train on. Contexts found, all held out: {quoted(sorted(found))}. Add the observational set "
            "and one set per concept."
        )
    return tuple(sorted(training)), tuple(sorted(found - training))
