"""The sample grids of a run: which contexts they show, and where they go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..bases.images import image_grid
from ..contexts import ConceptSet, Context
from ..errors import UserValueError
from ..inference.shown_contexts import shown_contexts
from .loop.checkpoints import write_file
from .optimization_arguments import OptimizationArguments


def validation_contexts(
    arguments: OptimizationArguments, observational_name: str, concepts: ConceptSet, held_out: Iterable[str] = ()
) -> list[Context]:
    """Rows of a grid: those named, or the observational context, the single concepts, unseen combinations.

    Raises:
        ValueError: for contexts with unknown concepts, or an empty list of them.
    """
    if arguments.validation_contexts is not None:
        names = ["" if name == observational_name else name for name in arguments.validation_contexts]
        chosen = [Context.parse(name) for name in names]
        concepts.strengths(chosen)  # refuses unknown names
        if not chosen:
            raise UserValueError("--validation_contexts names no context. Name some, or leave it out.")
        return chosen
    return shown_contexts(concepts, held_out)


def grid_name(step: int) -> str:
    """Return the grid's file in the folder of the run."""
    return f"samples/step-{step:06d}.png"


def newest_grid(folder: Path, num_steps: int) -> str | None:
    """Return the last grid of a run in its folder, None where there is none; those of a longer run may lie there."""
    numbers = (path.stem.removeprefix("step-") for path in folder.glob("samples/step-*.png"))
    steps = [int(number) for number in numbers if number.isdecimal() and 0 < int(number) <= num_steps]
    return grid_name(max(steps)) if steps else None


def write_grid(
    accelerator: Accelerator,
    output_dir: str,
    rows: Sequence[Tensor],
    labels: Sequence[str],
    step: int,
) -> None:
    """In the main process, write rows of images (n, C, H, W) in [0, 1], and show them to the trackers.

    Raises:
        CheckpointError: when the file cannot be written.
    """
    if not accelerator.is_main_process:
        return
    grid = image_grid(rows, labels)
    path = Path(output_dir, grid_name(step))
    write_file(path, Path(output_dir), grid.save)
    for tracker in accelerator.trackers:
        _log_grid(tracker, grid, step)


def _log_grid(tracker: Any, grid: Image.Image, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
    elif hasattr(tracker, "log_images"):
        tracker.log_images({"samples": [grid]}, step=step)
