"""What one concept does to the readings of all: the leakage matrix and the strength curve.

Shapes: N rows, K concepts, J readings (of K concepts, or of attributes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..contexts import ConceptSet, Context
from .results import Leakage, StrengthCurve


def leakage(
    concepts: ConceptSet,
    effects: Sequence[str],
    samples: Mapping[Context, Tensor],
    real: Mapping[Context, Tensor],
    reading: str,
) -> Leakage:
    """Mean effects of every single concept on readings (N, J), in samples and in real rows."""
    ours, truth = _effects(concepts, samples), _effects(concepts, real)
    # An effect the other way is none of the data's, so all of it is too much. One that no row shows is not known.
    excess = torch.where(ours * truth < 0, ours.abs(), ours.abs() - truth.abs()).nan_to_num(nan=-torch.inf)
    for i, cause in enumerate(concepts):
        for j, effect in enumerate(effects):
            if cause == effect:
                excess[i, j] = -torch.inf
    worst = divmod(int(excess.argmax()), len(effects)) if (excess > -torch.inf).any() else None
    return Leakage(
        reading,
        concepts.names,
        tuple(effects),
        ours.tolist(),
        truth.tolist(),
        (ours - truth).tolist(),
        concepts.names[worst[0]] if worst else None,
        effects[worst[1]] if worst else None,
        float(excess[worst]) if worst else None,
    )


def strength_curve(
    concept: str,
    logits: Mapping[float, Tensor],
    attribute: Mapping[float, Tensor] | None,
    zero_is_base: bool,
    zero_is_empty: bool,
    paired: bool = True,
) -> StrengthCurve:
    """Return the means of logits (N,), and of an attribute (N,), at every strength.

    `paired` says whether row n has the same noise at every strength. Else the means scatter by themselves, and only a
    fall by more than two standard errors is one.
    """
    strengths = sorted(logits)
    trained = [i for i, strength in enumerate(strengths) if 0 <= strength <= 1]
    means = [float(logits[strength].double().mean()) for strength in strengths]
    measured = None
    if attribute is not None:
        measured = tuple(float(attribute[strength].double().nanmean()) for strength in strengths)
    rising = _never_falls([means[i] for i in trained])
    if not paired:
        errors = [float(logits[strengths[i]].double().std() / len(logits[strengths[i]]) ** 0.5) for i in trained]
        steps = zip(pairwise([means[i] for i in trained]), pairwise(errors), strict=True)
        rising = all(a - b <= 2 * math.hypot(*noise) for (a, b), noise in steps)
    attribute_monotone = None
    if measured is not None:
        inside = [measured[i] for i in trained]
        attribute_monotone = _never_falls(inside) or _never_falls([-value for value in inside])
    return StrengthCurve(
        concept,
        tuple(strengths),
        tuple(means),
        tuple(float(logits[strength].sigmoid().mean()) for strength in strengths),
        rising,
        measured,
        attribute_monotone,
        zero_is_base,
        zero_is_empty,
    )


def _effects(concepts: ConceptSet, readings: Mapping[Context, Tensor]) -> Tensor:
    """(K, J): mean of do(i) minus mean of the empty context."""
    nothing = readings[Context()].nanmean(0)
    return torch.stack([readings[Context(name)].nanmean(0) - nothing for name in concepts])


def _never_falls(values: Sequence[float]) -> bool:
    return all(a <= b for a, b in pairwise(values))
