"""The worlds of images that methods are compared on: what they train on, what they are asked for, and the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_causal_context import ConceptSet, Context
from hf_causal_context.data.worlds import digits
from hf_causal_context.evaluation.classifiers import ConceptClassifier, train_classifier
from hf_causal_context.quickstart import Draw, reference_images

from ..worlds import edits
from ..worlds import type as fonts

STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5)  # beside 1, the only one that is trained
_CLASSIFIED = 1000  # real images of every context that a classifier learns from


@dataclass(frozen=True)
class World:
    """A world in which every context can be drawn.

    Args:
        concepts: in the order of the adapter.
        groups: name of a column of the table -> its contexts. The "singles" are trained on.
        draw: number, context, seed -> images (N, 32, 32), uint8, of the kind that methods train on.
        reference: context, number -> images as `draw` gives, which no training saw.
        at_strengths: as `groups`, at other strengths than 1.
        apart: whether no two contexts have an image in common, so that a classifier reads them off.
    """

    concepts: tuple[str, ...]
    groups: dict[str, tuple[Context, ...]]
    draw: Draw
    reference: Callable[[Context, int], NDArray[np.uint8]]
    at_strengths: dict[str, tuple[Context, ...]] = field(default_factory=dict)
    apart: bool = False

    @property
    def trained(self) -> tuple[Context, ...]:
        """What every method trains on."""
        return (Context(), *self.groups["singles"])

    @property
    def contexts(self) -> tuple[Context, ...]:
        """All that images are made of."""
        everything = (*self.groups.values(), *self.at_strengths.values())
        return (Context(), *(context for group in everything for context in group))

    @property
    def seen_by_oracle(self) -> tuple[Context, ...]:
        """All contexts of strength 1."""
        return (Context(), *(context for group in self.groups.values() for context in group))

    def floor(self, context: Context, num: int) -> Tensor:
        """Real images (N, 1, 32, 32) in [0, 1] of the kind that methods train on."""
        return torch.from_numpy(self.draw(num, context, 77))[:, None] / 255

    @cached_property
    def _classifier(self) -> ConceptClassifier:
        return train_classifier({c: self.truth(c, _CLASSIFIED) for c in self.contexts}, ConceptSet(self.concepts))

    def exact(self, context: Context, images: Tensor) -> float:
        """Share of images (N, 1, 32, 32) in which a classifier finds what the context has, and no more."""
        found = self._classifier.read(images) > 0
        return float((found == ConceptSet(self.concepts).mask([context]).bool()).all(1).float().mean())

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
    at_strengths = {
        f"{name} x {strength:g}": tuple(Context(dict.fromkeys(c.targets, strength)) for c in groups[name])
        for name in ("singles", "pairs")
        for strength in STRENGTHS
    }
    return World(fonts.CONCEPTS, groups, draw, lambda context, num: draw(num, context, 9000), at_strengths=at_strengths)


def edit_world() -> World:
    """Return the digits under edits that never happen by themselves; the reference has other glyphs."""
    sizes = {"singles": 1, "pairs": 2, "triple": 3}
    groups = {name: of_size(edits.CONCEPTS, size) for name, size in sizes.items()}

    def reference(context: Context, num: int) -> NDArray[np.uint8]:
        return edits.sample_edits(num, context, 9000, "test")

    return World(edits.CONCEPTS, groups, edits.sample_edits, reference, apart=True)


def of_size(concepts: tuple[str, ...], size: int) -> tuple[Context, ...]:
    """Return all contexts of as many concepts, of strength 1."""
    return tuple(Context(dict.fromkeys(names, 1.0)) for names in combinations(concepts, size))
