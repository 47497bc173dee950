"""Combinations drawn from the training rows: made once per run, and the same when it is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from ..contexts import quoted
from ..data import InterventionalData
from ..data.reweighting import ReweightedContext, check_sets, reweight, wanted_combinations
from .arguments import AdapterArguments
from .checkpoints import checkpoint_steps, write_file

FILE = "reweighted_contexts.json"
# For features of a frozen base, of which there are many and whose rows are few; chosen on the digit world.
_INPUT_NOISE = 0.8
_DROPOUT = 0.5


def add_reweighted_contexts(
    data: InterventionalData,
    arguments: AdapterArguments,
    accelerator: Accelerator,
    look: Callable[[Dataset], Tensor],
    made_from: Mapping[str, Any],
) -> InterventionalData:
    """The data with rows that stand for `--reweighted_contexts`; their numbers are kept in the output folder.

    The main process estimates and writes, the others read, and so does a run that goes on from a checkpoint.

    Args:
        data: with the observational set and one set per concept.
        arguments: the run's settings.
        accelerator: of the run.
        look: rows -> features (N, D) that tell what was intervened on; called only where ratios are estimated.
        made_from: what they depend on, as JSON, beside the contexts of the rows; another run's are refused.

    Raises:
        ValueError: for combinations that cannot be made, or a folder that holds another run's.
        CheckpointError: when the file cannot be written.
        FileNotFoundError: in a process that does not see the main process's output folder.
    """
    assert isinstance(data.rows, Dataset)  # the arguments refuse streams
    contexts: list[str] = data.rows["context"][:]
    wanted = wanted_combinations(arguments.reweighted_contexts, data.concepts)
    wanted = [context for context in wanted if str(context) not in data.contexts]  # those have rows of their own
    if not wanted:
        accelerator.print("No combination is left to reweight: all that were named have training rows of their own.")
        return data
    check_sets(contexts, data.concepts)
    output_dir = Path(arguments.output_dir)
    path = output_dir / FILE
    key = {
        "rows": blake2b("\n".join(contexts).encode(), digest_size=8).hexdigest(),
        "seed": arguments.seed,
        **made_from,
        "combinations": [str(context) for context in wanted],
    }
    if path.exists() and (checkpoint_steps(output_dir) or not accelerator.is_main_process):
        stored = json.loads(path.read_text())
        if stored["made_from"] != key:
            raise ValueError(
                f"{path} was made from other data or settings ({stored['made_from']}) than this run's ({key}). Resume "
                "with those, or choose another --output_dir."
            )
    elif checkpoint_steps(output_dir):
        raise ValueError(
            f"{output_dir} holds checkpoints of a run without --reweighted_contexts. Leave the argument out, or choose "
            "another --output_dir."
        )
    elif not accelerator.is_main_process:
        raise FileNotFoundError(f"{path} is not here. All processes must share the folder --output_dir.")
    else:
        output_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is found now
        with accelerator.autocast():
            features = look(data.rows)
        drawn = reweight(
            features,
            contexts,
            data.concepts,
            wanted,
            seed=arguments.seed,
            input_noise=_INPUT_NOISE,
            dropout=_DROPOUT,
            device=accelerator.device,
        )
        print(table(drawn), flush=True)
        stored = {"made_from": key, "contexts": {str(d.context): _to_json(d) for d in drawn}}
        text = json.dumps(stored) + "\n"
        write_file(path, output_dir, lambda unfinished: unfinished.write_text(text))
    rows = {name: np.array(entry["rows"], np.int64) for name, entry in stored["contexts"].items() if entry["rows"]}
    return dataclasses.replace(data, reweighted=rows)


def drawn_contexts(output_dir: Path) -> tuple[str, ...]:
    """The combinations that the run in a folder drew rows for."""
    stored = json.loads((output_dir / FILE).read_text())
    return tuple(name for name, entry in stored["contexts"].items() if entry["rows"])


def table(drawn: Sequence[ReweightedContext]) -> str:
    """What the data supports, as text: the effective sample size of every combination, and what to do about it."""
    width = max(len(str(d.context)) for d in drawn)
    lines = ["Combinations drawn from the training rows (effective sample size):"]
    for d in drawn:
        note = f"  {d.doubt}; not trained on, left to the mechanism" if d.doubt else ""
        lines.append(f"  {d.context!s:<{width}}  {d.effective_sample_size:>9.0f}{note}")
    if weak := [d.context for d in drawn if d.doubt]:
        targets = quoted(dict.fromkeys(target for context in weak for target in context.targets))
        lines.append(
            f"More rows of the sets {targets} would help, or rows in which these concepts' observational values come "
            "closer to those under intervention."
        )
    return "\n".join(lines)


def _to_json(drawn: ReweightedContext) -> dict[str, Any]:
    size, mass = round(drawn.effective_sample_size, 1), round(drawn.mass, 3)
    return {"effective_sample_size": size, "mass": mass, "doubt": drawn.doubt, "rows": drawn.rows.tolist()}
