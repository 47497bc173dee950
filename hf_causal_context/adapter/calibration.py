"""Calibrated strengths: a monotone map per concept, so that equal steps of a dial are equal changes of what is made.

A map is given by knots (dial, strength), both rising, from (0, 0) on and with (1, 1); between two knots it is linear.
Where nothing was measured, below the first knot and beyond the last one, a step of the dial is a step of the strength.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from .._files import CONFIG, complete_or_absent
from ..contexts import ConceptSet, Context
from ..errors import UserValueError
from ..messages.wording import short_repr

MAX_KNOTS = 100
MAX_NUMBER = 1e6

Knots: TypeAlias = Sequence[Sequence[float]]
# Concept -> its map, None for one without; concepts of other adapters are not in it.
Calibration: TypeAlias = Mapping[str, Knots | None]


def strength_at(dial: Tensor, knots: Knots) -> Tensor:
    """Map positions of a dial, of any shape, to strengths.

    Example:
        >>> strength_at(torch.tensor([-0.5, 0.0, 0.25, 1.0, 2.0]), [[0, 0], [0.5, 0.75], [1, 1]])
        tensor([-0.5000,  0.0000,  0.3750,  1.0000,  2.0000])
    """
    strength = dial.clamp(max=0.0) + (dial - knots[-1][0]).clamp(min=0.0)
    for (a, low), (b, high) in pairwise(knots):
        strength = strength + (high - low) * ((dial - a) / (b - a)).clamp(0.0, 1.0)
    return torch.where(dial == 1, dial, strength)  # which rounding would miss


def calibrated_context(context: Context, calibration: Calibration) -> Context:
    """Return the context that a context means whose strengths are positions of dials.

    Raises:
        ValueError: for a strength of a concept without a calibration, other than 1 if another concept has one.
    """
    strengths = dict(context.strengths)
    for name, dial in context.strengths.items():
        if name in calibration:
            strengths[name] = float(_mapped(torch.tensor([dial], dtype=torch.float64), name, calibration))
    return Context(strengths, observational=context.observational)


def calibrated_mask(mask: Tensor, concepts: ConceptSet, calibration: Calibration) -> Tensor:
    """Return the mask (S, K) that a mask means whose strengths are positions of dials.

    Raises:
        ValueError: for strengths of a concept without a calibration, other than 1 if another concept has one, or no
            mask of these concepts.
    """
    columns = concepts.check_mask(mask).unbind(1)
    return torch.stack([_mapped(dial, name, calibration) for dial, name in zip(columns, concepts, strict=True)], 1)


def _mapped(dial: Tensor, name: str, calibration: Calibration) -> Tensor:
    knots = calibration[name]
    if knots is not None:
        return strength_at(dial, knots)
    others = any(calibration.values())  # of an adapter with none, not even 1 is a position of a dial
    if bool(((dial != 0) & ((dial != 1) | (not others))).any()):
        raise UserValueError(
            f"The adapter holds no calibration of {name!r}, so a calibrated strength {'other than 0 and 1 ' * others}"
            "means nothing. Make one with `hf-causal-context evaluate --calibrate`, or leave calibrated out."
        )
    return dial


def check_calibration(calibration: object, concepts: Sequence[str]) -> None:
    """Raise ValueError for anything but a mapping from some of the concepts to knots."""
    if not isinstance(calibration, Mapping) or not set(calibration) <= set(concepts):
        raise UserValueError(
            f"calibration={short_repr(calibration)} must map names of the concepts to pairs (dial, strength)."
        )
    for name, knots in calibration.items():
        if not _are_knots(knots):
            raise UserValueError(
                f"calibration[{name!r}]={short_repr(knots)} must be up to {MAX_KNOTS} pairs of numbers (dial, "
                f"strength), both rising, from (0, 0) on, with (1, 1), and up to {MAX_NUMBER:,.0f}."
            )


def _are_knots(knots: object) -> bool:
    if not isinstance(knots, list | tuple) or not 2 <= len(knots) <= MAX_KNOTS:
        return False
    if not all(isinstance(knot, list | tuple) and len(knot) == 2 for knot in knots):
        return False
    numbers = [number for knot in knots for number in knot]
    if not all(type(number) in (int, float) and abs(number) <= MAX_NUMBER for number in numbers):
        return False
    rising = all(a < c and b < d for (a, b), (c, d) in pairwise(knots))
    pairs = [tuple(knot) for knot in knots]
    return rising and pairs[0] == (0, 0) and (1, 1) in pairs


def store_calibration(folder: Path, places: Iterable[str], calibration: Mapping[str, Knots]) -> None:
    """Write a calibration into the configs of a stored adapter, at all `places` in its folder that have one.

    Raises:
        OSError: for a folder that cannot be written.
    """
    for place in places:
        path = folder / place / CONFIG
        if path.is_file():
            fields = {**json.loads(path.read_text(encoding="utf-8")), "calibration": calibration}
            with complete_or_absent(path) as unfinished:  # as PEFT writes it
                unfinished.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
