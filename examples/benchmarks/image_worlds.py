"""The worlds of images that methods are compared on: what they train on, what they are asked for, and the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_causal_context import Context
from hf_causal_context.data.worlds import digits
from hf_causal_context.quickstart import Draw, reference_images

from ..worlds import type as fonts

STRENGTHS = (0.5, 1.5)  # beside 1, the only one that is trained


@dataclass(frozen=True)
class World:
    """A world in which every context can be drawn.

    Args:
        concepts: in the order of the adapter.
        groups: name of a column of the table -> its contexts. The "singles" are trained on.
        draw: number, context, seed -> images (N, 32, 32), uint8, of the kind that methods train on.
        reference: context, number -> images as `draw` gives, which no training saw.
    """

    concepts: tuple[str, ...]
    groups: dict[str, tuple[Context, ...]]
    draw: Draw
    reference: Callable[[Context, int], NDArray[np.uint8]]

    @property
    def trained(self) -> tuple[Context, ...]:
        """What every method trains on."""
        return (Context(), *self.groups["singles"])

    @property
    def contexts(self) -> tuple[Context, ...]:
        """All that images are made of."""
        return (Context(), *(context for group in self.groups.values() for context in group))

    @property
    def seen_by_oracle(self) -> tuple[Context, ...]:
        """All contexts of strength 1."""
        return tuple(context for context in self.contexts if set(context.strengths.values()) <= {1.0})

    def floor(self, context: Context, num: int) -> Tensor:
        """Real images (N, 1, 32, 32) in [0, 1] of the kind that methods train on."""
        return torch.from_numpy(self.draw(num, context, 77))[:, None] / 255

    def truth(self, context: Context, num: int) -> Tensor:
        """Real images (N, 1, 32, 32) in [0, 1] that no training saw."""
        return torch.from_numpy(self.reference(context, num))[:, None] / 255


def digit_world() -> World:
    """Return the quickstart's digits; the reference has other glyphs."""
    groups = {"singles": of_size(digits.CONCEPTS, 1), "pairs": of_size(digits.CONCEPTS, 2)}
    return World(digits.CONCEPTS, groups, lambda *given: digits.sample_digits(*given)[0], reference_images)


def type_world(fonts_dir: Path) -> World:
    """Return the type of a variable font, at several strengths; the reference draws the same characters anew."""

    def draw(num: int, context: Context, seed: int) -> NDArray[np.uint8]:
        return fonts.sample_type(num, context, seed, fonts_dir=fonts_dir)[0]

    sizes = {"singles": 1, "pairs": 2, "triples": 3, "all": 4}
    groups = {name: of_size(fonts.CONCEPTS, size) for name, size in sizes.items()}
    for strength in STRENGTHS:
        for name in ("singles", "pairs"):
            groups[f"{name} x {strength:g}"] = tuple(
                Context(dict.fromkeys(context.targets, strength)) for context in groups[name]
            )
    return World(fonts.CONCEPTS, groups, draw, lambda context, num: draw(num, context, 9000))


def of_size(concepts: tuple[str, ...], size: int) -> tuple[Context, ...]:
    """Return all contexts of as many concepts, of strength 1."""
    return tuple(Context(dict.fromkeys(names, 1.0)) for names in combinations(concepts, size))
