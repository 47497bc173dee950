"""Finds images of one context that look like one of another: copies in another file, and edits that did nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..media.pixels import plain

# Gray levels by which thumbnails of two images may differ anywhere, and on average. JPEG and resizing change 1 or 2;
# 7,500 digits of the quickstart have no pair within 12.
TOLERANCE, MEAN_TOLERANCE = 8, 2.0
_SIDE = 16
EXAMPLES = 5

Place: TypeAlias = tuple[str, str, str]  # role, context, name with the context


class LookAlikes:
    """Thumbnails of images, to be compared when all are there."""

    def __init__(self) -> None:
        self._thumbnails: list[NDArray[np.uint8]] = []
        self._contents: list[bytes] = []
        self._places: list[Place] = []

    def add(self, image: Image.Image, content: bytes, place: Place) -> None:
        """Note an image; `content` tells its file from others."""
        small = plain(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
        self._thumbnails.append(np.asarray(small).ravel())
        self._contents.append(content)
        self._places.append(place)

    def pairs(self) -> list[tuple[Place, Place]]:
        """Every image that looks like an earlier one of another context, with the first such, but not the same file."""
        if not self._thumbnails:
            return []
        thumbnails = np.stack(self._thumbnails).astype(np.int16)
        contexts = np.array([context for _, context, _ in self._places], dtype=object)
        means = thumbnails.mean(1)
        order = np.argsort(means, kind="stable")
        ordered = means[order]
        found = []
        for number, mean in enumerate(means):
            # Only those of like brightness, which are side by side, are worth a look.
            begin, end = np.searchsorted(ordered, (mean - MEAN_TOLERANCE, mean + MEAN_TOLERANCE))
            near = np.sort(order[begin:end])
            near = near[(near < number) & (contexts[near] != contexts[number])]
            alike = near[(np.abs(thumbnails[near] - thumbnails[number]) <= TOLERANCE).all(1)]
            others = (each for each in alike if self._contents[each] != self._contents[number])
            if (first := next(others, None)) is not None:
                found.append((self._places[first], self._places[number]))
        return found


def same(pairs: Sequence[tuple[Place, Place]]) -> list[str]:
    """Name pairs of places, for `examples`."""
    return [f"{first} = {second}" for (*_, first), (*_, second) in pairs]


def examples(items: Sequence[str]) -> str:
    """Name the first of some things, and say how many more there are."""
    more = f" and {len(items) - EXAMPLES} more" if len(items) > EXAMPLES else ""
    return ", ".join(items[:EXAMPLES]) + more
