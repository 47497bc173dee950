"""Calibrations from a report: for each concept, at what strength a step of its dial is a step of the response."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..adapter.calibration import MAX_KNOTS
from ..contexts import Context
from ..errors import UserValueError
from .results import EvaluationReport, StrengthCurve

if TYPE_CHECKING:
    from ..data import InterventionalData

MIN_ROWS = 50  # samples at each strength, and real rows: fewer make a map of their noise

Knots = list[tuple[float, float]]


def check_rows(data: InterventionalData) -> None:
    """Refuse data of which no concept can be calibrated, as far as they are counted: streams are not.

    Raises:
        ValueError: naming the numbers of rows.
    """
    if (counts := data.counts) is None:
        return
    observational = counts.get("", 0)
    singles = {name: counts.get(str(Context(name)), 0) for name in data.concepts}
    if min(observational, max(singles.values())) < MIN_ROWS:
        listed = ", ".join(f"{count} of {name!r}" for name, count in singles.items())
        raise UserValueError(
            f"--calibrate needs {MIN_ROWS} rows without intervention, and as many of a concept alone. There are "
            f"{observational} without intervention, {listed}. Add rows, or leave --calibrate out."
        )


def calibrations(report: EvaluationReport) -> tuple[dict[str, Knots], list[str]]:
    """Return knots (dial, strength) of the concepts that can be calibrated, and why the others cannot.

    Raises:
        ValueError: if none can.
    """
    found: dict[str, Knots] = {}
    problems = []
    for curve in report.strength_curves:
        if problem := _problem(curve):
            problems.append(problem)
        else:
            found[curve.concept] = _knots(curve)
    if not found:
        raise UserValueError("No calibration was stored. " + " ".join(problems))
    return found, problems


def _problem(curve: StrengthCurve) -> str | None:
    response, name = curve.response, repr(curve.concept)
    if response is None:
        return (
            f"{name} has an effect too small to be told from chance, in the samples or in the data: train longer, or "
            "draw more samples (--num_samples), or add rows."
        )
    if response.num_samples < MIN_ROWS or response.num_real < MIN_ROWS:
        enough = {"raise --num_samples": response.num_samples, "add rows": response.num_real}
        return (
            f"{name} was measured on {response.num_samples} samples at each strength and {response.num_real} real "
            f"rows; a calibration needs {MIN_ROWS} of both: "
            f"{' and '.join(advice for advice, number in enough.items() if number < MIN_ROWS)}."
        )
    if inside := [strength for strength in response.falls if strength <= 1]:
        where = ", ".join(f"{strength:g}" for strength in inside)
        return (
            f"{name} is not monotone: its effect falls at {where}, so no dial can order it. Train on rows at strengths "
            f"in between (folders such as '{curve.concept}=0.5'), or longer."
        )
    return None


def _knots(curve: StrengthCurve) -> Knots:
    """(response, strength), without strengths at which chance, or a fall beyond 1, breaks the order.

    Of more than a config holds, every other one is left out, but for 1 and the last.
    """
    assert curve.response is not None
    knots: Knots = [(0.0, 0.0)]
    for strength, went in zip(curve.strengths, curve.response.samples, strict=True):
        dial = round(went, 4)
        if strength == 1:
            knots.append((1.0, 1.0))
        elif strength > 0 and dial > knots[-1][0] and (dial < 1) == (strength < 1):
            knots.append((dial, strength))
        elif strength > 1:
            break
    while len(knots) > MAX_KNOTS:
        knots = [knot for i, knot in enumerate(knots) if i % 2 == 0 or knot in ((1.0, 1.0), knots[-1])]
    return knots
