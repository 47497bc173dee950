"""Writes a report: report.json, report.md, report.png, and samples.png for images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from .._files import complete_or_absent
from ..bases.images import side_by_side
from .figure import draw_report
from .markdown import markdown
from .results import EvaluationReport

_SHOWN_REAL = 4


def write_report(report: EvaluationReport, folder: Path) -> list[Path]:
    """Write every file under a temporary name first, and return the paths.

    Without matplotlib there is no report.png, which is printed.

    Raises:
        OSError: for a folder that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(report.to_dict()), indent=2, allow_nan=False) + "\n"
    paths = [
        _write(folder / "report.json", lambda path: path.write_text(text, encoding="utf-8")),
        _write(folder / "report.md", lambda path: path.write_text(markdown(report), encoding="utf-8")),
    ]
    try:
        paths.append(_write(folder / "report.png", lambda path: draw_report(report, path)))
    except ImportError as error:
        print(f"No report.png: {error}", flush=True)
    if (grid := samples_grid(report)) is not None:
        paths.append(_write(folder / "samples.png", grid.save))
    for name in {"report.png", "samples.png"} - {path.name for path in paths}:
        (folder / name).unlink(missing_ok=True)  # of an earlier report
    return paths


def samples_grid(report: EvaluationReport) -> Image.Image | None:
    """Real images on the left, samples on the right, one row per context; None for anything but images."""
    labels, real, samples = [], [], []
    for result in report.contexts:
        truth, own = report.examples[result.context]
        if own.ndim != 4 or own.shape[1] not in (1, 3):
            return None
        name = result.context or "(observational)"
        labels.append(name if result.trained else f"{name} (held out)")
        # Rows of a context without real images are left white.
        real.append(own.new_ones(_SHOWN_REAL, *own.shape[1:]) if truth is None else truth[:_SHOWN_REAL])
        samples.append(own)
    return side_by_side(real, samples, labels, ("real images", "samples"))


def _write(path: Path, save: Callable[[Path], Any]) -> Path:
    with complete_or_absent(path) as unfinished:
        save(unfinished)
    return path


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
