"""How far each strength moves what is made, on the way from the empty context to strength 1.

Read is one number per row: the attribute with the concept's name where there is one; else the projection of the
extractor's features, or of the rows themselves, on the step between the means of real rows. So samples do not choose
the direction in which they are measured, and their noise adds nothing to the way.

Shapes: N rows, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ..contexts import Context
from .evidence import EvaluationInputs
from .readings import Measurements
from .results import Response

_STANDARD_ERRORS = 3.0  # of six steps for each concept, hardly one falls by so much by chance


def response(evidence: EvaluationInputs, concept: str) -> Response | None:
    """Return the response of a concept's curve, None without 0 and 1 in it, or with a step that may be chance."""
    curve = evidence.strengths[concept]
    if not {0.0, 1.0} <= set(curve):
        return None
    name, read = _reading(evidence, concept)
    read_samples = {strength: read(rows) for strength, rows in sorted(curve.items())}
    paired = not evidence.holds_texts  # the same seeds
    step, noise = _step(read_samples[0.0], read_samples[1.0], paired)
    usable = evidence.usable()
    read_real = {s: read(usable[context]) for s in curve if (context := Context({concept: s})) in usable}
    true_step, true_noise = _step(read_real[0.0], read_real[1.0], False)
    if not (abs(step) > _STANDARD_ERRORS * noise and abs(true_step) > _STANDARD_ERRORS * true_noise):
        return None
    falls = []
    for (_, before), (high, after) in pairwise(read_samples.items()):
        change, chance = _step(before, after, paired)
        if high > 0 and change / step < -_STANDARD_ERRORS * chance / abs(step):
            falls.append(high)
    return Response(
        reading=name,
        samples=tuple(_step(read_samples[0.0], rows, paired)[0] / step + 0.0 for rows in read_samples.values()),
        truth=tuple(
            _step(read_real[0.0], read_real[s], False)[0] / true_step if s in read_real else None for s in read_samples
        ),
        falls=tuple(falls),
        num_samples=min(map(len, curve.values())),
        num_real=min(len(read_real[0.0]), len(read_real[1.0])),
    )


def _reading(evidence: EvaluationInputs, concept: str) -> tuple[str, Callable[[Measurements], Tensor]]:
    """Return what is read, in words, and the function that reads it: rows -> (N,), float64."""
    if concept in evidence.attribute_names:
        column = evidence.attribute_names.index(concept)
        return "attributes", lambda rows: _present(rows.attributes)[:, column].double()
    has_features = evidence.real[Context()].features is not None

    def values(rows: Measurements) -> Tensor:
        return (_present(rows.features) if has_features else rows.values).flatten(1).double()

    start, end = (values(evidence.real[context]).mean(0) for context in (Context(), Context(concept)))
    what = "features" if has_features else "words and characters" if evidence.holds_texts else "the rows themselves"
    return f"{what}, along the step between the means of real rows", lambda rows: values(rows) @ (end - start)


def _present(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def _step(before: Tensor, after: Tensor, paired: bool) -> tuple[float, float]:
    """The change of the mean from rows (N,) to others, NaN left out, and its standard error."""
    if paired:
        change = after - before
        change = change[~change.isnan()]
        return float(change.mean()), float(change.std()) / math.sqrt(max(1, len(change)))
    before, after = before[~before.isnan()], after[~after.isnan()]
    noise = math.hypot(*(float(rows.std()) / math.sqrt(max(1, len(rows))) for rows in (before, after)))
    return float(after.mean() - before.mean()), noise
