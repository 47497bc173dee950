"""Texts as vectors that a linear classifier reads: how often they hold which characters and words.

Shapes: N texts, D features.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Characters and their pairs see case, marks, emoji and languages without spaces; words see what is said.
_MOST_COMMON, _FEWEST_TEXTS = 2000, 3
_WORD = re.compile(r"\w+|[^\w\s]")


class Ngrams:
    """The commonest characters, pairs of characters and words of some texts, by how many of the texts hold them."""

    def __init__(self, texts: Iterable[str]) -> None:
        # Not sets, whose order differs between processes: of equally common ones the first are kept.
        holding = Counter(gram for text in texts for gram in dict.fromkeys(_grams(text)))
        common = [gram for gram, number in holding.most_common(_MOST_COMMON) if number >= _FEWEST_TEXTS]
        self._columns = {gram: column for column, gram in enumerate(common)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """log(1 + count) of each, and of all characters: (N, D)."""
        values = torch.zeros(len(texts), len(self._columns) + 1)
        for row, text in enumerate(texts):
            for gram, number in Counter(_grams(text)).items():
                if (column := self._columns.get(gram)) is not None:
                    values[row, column] = math.log1p(number)
            values[row, -1] = math.log1p(len(text))
        return values


def _grams(text: str) -> Iterator[tuple[str, str]]:
    """Every occurrence, with its kind."""
    for length in (1, 2):
        yield from (("characters", text[i : i + length]) for i in range(len(text) - length + 1))
    yield from (("word", word.lower()) for word in _WORD.findall(text))
