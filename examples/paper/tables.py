"""Our results beside the published ones, as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import World

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())


def table(world: World, published: str | None, runs: dict[str, list[dict[str, Any]]], floors: list[dict]) -> str:
    """One row for each method: mean and standard deviation over seeds, concept learning / composition."""
    metrics = ["published", "distinct", *floors[0]["attributes"]]
    header = ["method", "published results", *(f"ours, {metric}" for metric in metrics), "reconstruction", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    numbers = PUBLISHED[published] if published else {}
    for method, results in runs.items():
        cells = [method, _cited(numbers.get(method.partition(",")[0]))]
        cells += [_pair(world, results, metric) for metric in metrics]
        cells.append(_mean([result["reconstruction"] for result in results]))
        cells.append(f"{np.mean([result['seconds'] for result in results]):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    cells = [_pair(world, floors, metric) for metric in metrics]
    lines.append(f"| real images (floor) | | {' | '.join(cells)} | | |")
    for method, cited in numbers.items():
        if method not in runs:
            lines.append(f"| {method} (not run) | {_cited(cited)} |" + " |" * (len(header) - 2))
    return "\n".join(lines)


def _pair(world: World, results: list[dict[str, Any]], metric: str) -> str:
    measured = [result | result["attributes"] for result in results]
    groups = [group for group in (world.trained, world.held_out) if group]
    return " / ".join(_mean([np.mean([r[metric][str(c)] for c in group]) for r in measured]) for group in groups)


def _mean(values: Sequence[Any]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def _cited(numbers: list[float | None] | None) -> str:
    return "" if numbers is None else " / ".join("-" if number is None else f"{number:.3f}" for number in numbers)
