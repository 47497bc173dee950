"""Combinations drawn from the training rows: made once per run, and the same when it is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from ..contexts import quoted
from ..data import InterventionalData
from ..data.reweighting import MIN_EFFECTIVE_SAMPLE_SIZE, ReweightedContext, reweight, wanted_combinations
from .arguments import TrainingArguments
from .checkpoints import checkpoint_steps, not_written
from .families import Base
from .features import denoiser_features

FILE = "reweighted_contexts.json"
# For features of pictures, of which there are many and whose rows are few; chosen on the digit world.
_INPUT_NOISE = 0.8
_DROPOUT = 0.5


def add_reweighted_contexts(
    data: InterventionalData, base: Base, model: nn.Module, arguments: TrainingArguments, *, is_main_process: bool
) -> InterventionalData:
    """The data with rows that stand for `--reweighted_contexts`; their numbers are kept in the output folder.

    The main process estimates and writes, the others read, and so does a run that goes on from a checkpoint.

    Args:
        data: with the observational set and one set per concept.
        base: whose denoiser looks at the pictures.
        model: the denoiser with a fresh adapter.
        arguments: the run's settings.
        is_main_process: whether this process estimates.

    Raises:
        ValueError: for a stream, combinations that cannot be made, or a folder that holds another run's.
        CheckpointError: when the file cannot be written.
    """
    if not isinstance(data.rows, Dataset):
        raise ValueError("--reweighted_contexts draws rows by number, which a stream has not. Leave --streaming out.")
    wanted = wanted_combinations(arguments.reweighted_contexts, data.concepts)
    wanted = [context for context in wanted if str(context) not in data.contexts]  # those have rows of their own
    if not wanted:
        return data
    output_dir = Path(arguments.output_dir)
    key = {"rows": len(data.rows), "seed": arguments.seed, "combinations": [str(context) for context in wanted]}
    stored = _read(output_dir / FILE) if not is_main_process or checkpoint_steps(output_dir) else None
    if stored is not None and stored["made_from"] != key:
        raise ValueError(
            f"{output_dir / FILE} was made from other data or settings ({stored['made_from']}) than this run's "
            f"({key}). Resume with those, or choose another --output_dir."
        )
    if stored is None:
        resolution = arguments.resolution or base.default_resolution
        features = denoiser_features(base, model, data.rows[data.image_column], resolution, len(data.concepts))
        device = next(model.parameters()).device
        drawn = reweight(
            features,
            data.rows["context"],
            data.concepts,
            wanted,
            seed=arguments.seed,
            input_noise=_INPUT_NOISE,
            dropout=_DROPOUT,
            device=device,
        )
        print(table(drawn), flush=True)
        stored = {"made_from": key, "contexts": {str(d.context): _to_json(d) for d in drawn}}
        _write(output_dir, stored)
    rows = {name: np.array(entry["rows"], np.int64) for name, entry in stored["contexts"].items() if entry["rows"]}
    return dataclasses.replace(data, reweighted=rows)


def drawn_contexts(output_dir: Path) -> tuple[str, ...]:
    """The combinations that the run in a folder drew rows for."""
    stored = _read(output_dir / FILE) or {"contexts": {}}
    return tuple(name for name, entry in stored["contexts"].items() if entry["rows"])


def table(drawn: Sequence[ReweightedContext]) -> str:
    """What the data supports, as text: the effective sample size of every combination, and what to do about it."""
    width = max(len(str(d.context)) for d in drawn)
    lines = ["Combinations drawn from the training rows (effective sample size):"]
    for d in drawn:
        note = "" if d.supported else f"  {_reason(d)}: not trained on, left to the mechanism"
        lines.append(f"  {d.context!s:<{width}}  {d.effective_sample_size:>9.0f}{note}")
    if weak := [d.context for d in drawn if not d.supported]:
        targets = quoted(dict.fromkeys(target for context in weak for target in context.targets))
        lines.append(
            f"More rows of the sets {targets} would help, or rows in which these concepts' observational values come "
            "closer to those under intervention."
        )
    return "\n".join(lines)


def _reason(drawn: ReweightedContext) -> str:
    if drawn.effective_sample_size < MIN_EFFECTIVE_SAMPLE_SIZE:
        return f"below {MIN_EFFECTIVE_SAMPLE_SIZE}"
    return f"its mass is {drawn.mass:.2g} instead of 1, so the estimate contradicts itself"


def _to_json(drawn: ReweightedContext) -> dict[str, Any]:
    size, mass = round(drawn.effective_sample_size, 1), round(drawn.mass, 3)
    return {"effective_sample_size": size, "mass": mass, "rows": drawn.rows.tolist()}


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _write(output_dir: Path, content: dict[str, Any]) -> None:
    unfinished = output_dir / f".{FILE}.unfinished"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content) + "\n")
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise not_written(output_dir / FILE, output_dir, error) from error
    unfinished.replace(output_dir / FILE)
