"""Pairs: rows of several contexts that show one sample, such as photographs before and after.

The rows of a sample have one name in the column "pair". The partner of a row is the observational row of its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Features, Value
from numpy.typing import NDArray

from ..errors import UserValueError
from .look_alikes import Place, examples, same

ALONE = ""  # the name in a row that belongs to no other

Size = tuple[int, int]


def check_names(features: Features, column: str) -> None:
    """Refuse a column that cannot hold names of samples.

    Raises:
        ValueError: for anything but texts and whole numbers.
    """
    feature = features[column]
    if not isinstance(feature, Value) or not ("string" in feature.dtype or "int" in feature.dtype):
        raise UserValueError(
            f"The column {column!r} holds {feature}, not names of samples. Name a column of texts or whole numbers as "
            "pair_column=, in which the rows of one sample have the same."
        )


def name_of(value: object) -> str:
    """Return the name in a row of a dataset."""
    return ALONE if value is None else str(value)


def partners(contexts: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each row's partner, -1 where there is none: of observational rows, for example."""
    numbered = enumerate(zip(contexts, names, strict=True))
    observational = {name: number for number, (context, name) in numbered if not context and name != ALONE}
    found = (observational.get(n, -1) if c else -1 for c, n in zip(contexts, names, strict=True))
    return np.fromiter(found, np.int64, len(names))


class Partners:
    """Rows with their names, to be told about when all are there."""

    def __init__(self) -> None:
        self._observational: dict[str, tuple[Place, Size | None]] = {}
        self._others: list[tuple[str, Place, Size | None]] = []
        self.twice: list[tuple[Place, Place]] = []  # observational rows of one name

    def add(self, name: str, place: Place, size: Size | None) -> None:
        """Note a row; the size is that of its image, if it was looked at."""
        _, context, _ = place
        if context:
            self._others.append((name, place, size))
        elif name in self._observational:
            self.twice.append((self._observational[name][0], place))
        elif name != ALONE:
            self._observational[name] = place, size

    def count(self) -> Counter[str]:
        """Return how many rows of each context have a partner; of observational ones, how many are one."""
        named = [(name, context) for name, (_, context, _), _ in self._others if name in self._observational]
        return Counter(context for _, context in named) + Counter({"": len({name for name, _ in named})})

    def missing(self) -> list[str]:
        """Name the rows of interventions that have no partner."""
        return [whole for name, (*_, whole), _ in self._others if name not in self._observational]

    def of_two_sizes(self) -> Iterator[str]:
        """Name the rows whose partner has another size, and both sizes."""
        for name, (*_, whole), size in self._others:
            (*_, partner), its = self._observational.get(name, (("",), None))
            if size is not None and its is not None and size != its:
                yield f"{partner}, {its[0]} x {its[1]}, and {whole}, {size[0]} x {size[1]}"

    def errors(self, noun: str) -> Iterator[str]:
        """Say what makes the pairs useless; `noun` is what rows are called."""
        if self.twice:
            yield (
                f"{len(self.twice)} observational {noun} have the name of another one: {examples(same(self.twice))}. "
                "Which of them others belong to is then ambiguous. Give each sample a name of its own."
            )
        if not self.count().total():
            yield (
                f"No pairs: none of the {noun} of interventions has the name of an observational one. Where nothing "
                "is paired, leave pair_column= and paired_files= out; else give both sides of a pair the same name."
            )

    def warnings(self, noun: str) -> Iterator[str]:
        """Say what of the pairs may not be meant."""
        if missing := self.missing():
            yield (
                f"{len(missing)} {noun} of interventions have no partner, an observational one of the same name: "
                f"{examples(missing)}. They count as {noun} without a pair."
            )
        if differing := list(self.of_two_sizes()):
            yield (
                f"{len(differing)} pairs have two sizes: {examples(differing)}. Each is cut and scaled by itself, so "
                "what is at a place of one may be elsewhere in the other. Cut both alike."
            )
