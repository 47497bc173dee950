"""Finds sets of images that are of another size or shape than the observational ones: a concept would learn that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

OTHER = 1.5  # times the width or height
FEWEST = 10  # images of a set, of which the median says something


class Sizes:
    """Widths and heights of the images of each context."""

    def __init__(self) -> None:
        self._sizes: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)

    def add(self, context: str, size: tuple[int, int]) -> None:
        """Note an image, upright."""
        self._sizes[context].append(size)

    def warnings(self) -> Iterator[str]:
        """Say which sets are not like the observational one, by the median."""
        medians = {c: np.median(sizes, axis=0) for c, sizes in self._sizes.items() if len(sizes) >= FEWEST}
        if (plain := medians.pop("", None)) is None:
            return
        others = {c: own for c, own in sorted(medians.items()) if np.exp(np.abs(np.log(own / plain))).max() >= OTHER}
        if others:
            listed = ", ".join(f"{context} ({_told(size)})" for context, size in others.items())
            yield (
                f"Images of another size than the observational ones ({_told(plain)}): {listed}. Scaled and cut to one "
                "size, they are softer or sharper, or framed otherwise, and that is learned with the concept. Save all "
                "sets at one size."
            )


def _told(size: np.ndarray) -> str:
    width, height = size.round().astype(int)
    return f"{width} x {height}"
