"""A report as one image: distances or perplexities, conformity, leakage, strength curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import MissingPackageError
from ..messages.installation import installation
from .metrics import Estimate
from .results import EvaluationReport, Leakage
from .verdict import worst_leak

_SAMPLES, _FLOOR, _BASE = "#2a6f97", "#8fb996", "#d9d9d9"
_UNSEEN = "#c1440e"
_NOTHING = Estimate(0.0)


def draw_report(report: EvaluationReport, path: Path) -> None:
    """Save the image as PNG.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(f"Plots need matplotlib: {installation('plot')}") from error

    K = len(report.concepts)
    heights = (0.9 + 0.42 * len(report.contexts), 2.2 + 0.42 * K, 3.0)
    figure = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained")
    top, middle, bottom = cast(Any, figure.subfigures(3, 1, height_ratios=heights))
    _contexts(top, report)
    _leakage(middle, report.leakage)
    _strengths(bottom, report)
    figure.savefig(path, dpi=150, format="png")


def _contexts(figure: Any, report: EvaluationReport) -> None:
    results = report.contexts
    figure.suptitle("Each context beside the truth", x=0.01, ha="left", fontweight="bold")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    if report.drift is None:
        scores = [result.perplexity for result in results]
        _bars(
            left,
            [
                (_SAMPLES, "in its context", [_known(score and score.adapter) for score in scores]),
                (_FLOOR, "in the empty context", [_known(score and score.empty) for score in scores]),
                (_BASE, "base", [_known(score and score.base) for score in scores]),
            ],
            "perplexity of real rows (lower is likelier)",
        )
    else:
        distances = [result.distance for result in results]
        _bars(
            left,
            [
                (_SAMPLES, "samples", [distance.samples if distance else _NOTHING for distance in distances]),
                (
                    _FLOOR,
                    "floor: other real rows",
                    [distance.floor if distance else _NOTHING for distance in distances],
                ),
                (_BASE, "base", [distance.base if distance else _NOTHING for distance in distances]),
            ],
            "sliced Wasserstein distance to real rows (lower is better)",
        )
    # Intervals of two or three groups can be wider than anything measured.
    left.set_xlim(0, 1.1 * max(bar.get_width() for bar in left.patches))
    _bars(
        right,
        [
            (_SAMPLES, "samples", [result.conformity or _NOTHING for result in results]),
            (_FLOOR, "real rows", [_known(result.real_conformity) for result in results]),
            (_BASE, "base", [_known(result.base_conformity) for result in results]),
        ],
        "conformity: all that was asked for is found",
    )
    right.set_xlim(0, 1.03)
    names = [result.context or "(observational)" for result in results]
    left.set_yticks(
        range(len(results)), [n if r.trained else f"{n}  (held out)" for n, r in zip(names, results, strict=True)]
    )
    for tick, result in zip(left.get_yticklabels(), results, strict=True):
        tick.set_color("black" if result.trained else _UNSEEN)
    left.invert_yaxis()  # and the other's, which is shared
    for axes in (left, right):
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _known(value: float | None) -> Estimate:
    """Return a bar; of no length where nothing was measured, or the value is infinite."""
    return Estimate(value) if value is not None and np.isfinite(value) else _NOTHING


def _bars(axes: Any, series: Sequence[tuple[str, str, Sequence[Estimate]]], label: str) -> None:
    """Three bars for each context."""
    height = 0.27
    for place, (color, name, estimates) in enumerate(series, start=-1):
        axes.barh(
            np.arange(len(estimates)) + place * height,
            [estimate.mean for estimate in estimates],
            height,
            xerr=[estimate.half_width or 0 for estimate in estimates],
            error_kw={"lw": 0.8, "ecolor": "#333333"},
            color=color,
            label=name,
        )
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _leakage(figure: Any, leakage: Leakage) -> None:
    figure.suptitle(f"Leakage: what do(row) changes ({leakage.reading})", x=0.01, ha="left", fontweight="bold")
    axes = figure.subplots(1, 3, sharey=True)
    panels = (("samples", leakage.samples), ("data", leakage.data), ("samples minus data", leakage.difference))
    image = None
    for ax, (title, matrix) in zip(axes, panels, strict=True):
        values = np.array(matrix)
        image = ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set_title(title)
        ax.set_xticks(range(len(leakage.effects)), leakage.effects, rotation=35, ha="right")
        ax.set_yticks(range(len(leakage.causes)), [f"do({cause})" for cause in leakage.causes])
        if len(leakage.causes) <= 10:
            for (i, j), value in np.ndenumerate(values):
                color = "white" if abs(value) > 0.6 else "black"
                ax.text(j, i, f"{value:+.2f}", ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, ax=list(axes), shrink=0.8)
    figure.supxlabel(worst_leak(leakage), fontsize=10)


def _strengths(figure: Any, report: EvaluationReport) -> None:
    if not report.strength_curves:
        return
    figure.suptitle("Strength: mean reading of each concept's classifier", x=0.01, ha="left", fontweight="bold")
    left, right, way = figure.subplots(1, 3)
    for curve in report.strength_curves:
        label = curve.concept if curve.monotone else f"{curve.concept} (not monotone)"
        left.plot(curve.strengths, curve.logits, marker="o", ms=4, label=label)
        (line,) = right.plot(curve.strengths, curve.probabilities, marker="o", ms=4, label=label)
        if curve.response is not None:
            way.plot(curve.strengths, curve.response.samples, marker="o", ms=4, color=line.get_color())
            truth = [np.nan if value is None else value for value in curve.response.truth]
            way.plot(curve.strengths, truth, "x", ms=7, color=line.get_color())
    panels = ((left, "logit"), (right, "probability"), (way, "way from 0 to 1 (x: real rows)"))
    for ax, name in panels:
        ax.axvspan(1, max(report.strength_curves[0].strengths), color="#f2f2f2", zorder=0)
        ax.set(xlabel="strength", ylabel=name)
        ax.spines[["top", "right"]].set_visible(False)
    right.set_ylim(-0.03, 1.03)
    right.legend(frameon=False)
