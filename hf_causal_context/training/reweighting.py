"""Combinations drawn from the training rows: made once per run, and the same when it is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from .._files import checkpoint_steps
from ..contexts import Context
from ..data import InterventionalData
from ..data.reweighting import ReweightedContext, check_sets, reweight, wanted_combinations, without_rows
from ..errors import UserValueError
from ..messages.progress import say
from ..messages.wording import quoted
from .arguments import AdapterArguments
from .loop.checkpoints import earlier_run, write_text

FILE = "reweighted_contexts.json"
RATIOS = "density_ratios.pt"
# For features of a frozen base, of which there are many and whose rows are few; chosen on the digit world.
_INPUT_NOISE = 0.8
_DROPOUT = 0.5

# What would help, by the kind of doubt.
_ADVICE = {
    "apart": (
        "{combinations}: more rows of the same kind hardly help, since next to no observational row looks intervened "
        "on. What helps: some rows in which all of it was changed, trained on with --training_contexts; observational "
        "rows in which {concepts} come by themselves at times, with sets made from such rows; or softer edits, of "
        "strengths that differ from row to row, so soft that some unedited rows look edited. If the tool leaves a "
        "trace in every row, pass the observational rows through it, too. Of texts, --self_composed_contexts trains on "
        "those that the adapter writes itself. Else leave these combinations to the mechanism."
    ),
    "alike": (
        "{combinations}: the base sees no difference between the sets of {concepts} and the observational one. Look "
        "whether the rows were changed at all, and whether it shows at the size at which they are read; then make the "
        "change stronger."
    ),
    "few": (
        "More rows of the sets {concepts} would help {combinations}, or rows in which these concepts' observational "
        "values come closer to those under intervention."
    ),
    "contradictory": (
        "{combinations}: more rows of the sets {concepts} would help if each of them differs from the observational "
        "one by its own concept alone. If they were selected, or share another change, leave these combinations to the "
        "mechanism."
    ),
}


def add_reweighted_contexts(
    data: InterventionalData,
    arguments: AdapterArguments,
    accelerator: Accelerator,
    extract_features: Callable[[Dataset], Tensor],
    fingerprint: Mapping[str, Any],
) -> InterventionalData:
    """Return the data with rows that stand for `--reweighted_contexts`; their numbers are kept in the output folder.

    The main process estimates and writes, the others read, and so does a run that goes on from a checkpoint.

    Args:
        data: with the observational set and one set per concept.
        arguments: the run's settings.
        accelerator: of the run.
        extract_features: rows -> features (N, D) that tell what was intervened on; called only to estimate ratios.
        fingerprint: what they depend on, as JSON, beside the contexts of the rows; another run's are refused.

    Raises:
        ValueError: for combinations that cannot be made, or a folder that holds another run's.
        CheckpointError: when the file cannot be written.
        FileNotFoundError: in a process that does not see the main process's output folder.
    """
    assert isinstance(data.rows, Dataset)  # the recipe refuses streams
    contexts: list[str] = data.rows["context"][:]
    wanted = wanted_combinations(arguments.reweighted_contexts, data.concepts)
    if not (wanted := without_rows(wanted, data.contexts, "reweighted", accelerator.print)):
        return data
    codes = check_sets(contexts, data.concepts)
    others = sum(code < 0 and len(Context.parse(c).targets) == 1 for c, code in zip(contexts, codes, strict=True))
    if others:
        accelerator.print(
            f"Reweighting uses the {int((codes >= 0).sum())} observational rows and rows of single concepts at "
            f"strength 1, and makes combinations at strength 1. The {others} rows at other strengths are trained on as "
            "they are."
        )
    output_dir = Path(arguments.output_dir)
    path = output_dir / FILE
    key = {
        "rows": blake2b("\n".join(contexts).encode(), digest_size=8).hexdigest(),
        "seed": arguments.seed,
        **fingerprint,
        "combinations": [str(context) for context in wanted],
    }
    earlier = earlier_run(arguments) or (output_dir if checkpoint_steps(output_dir) else None)
    known = path if earlier is None else earlier / FILE
    if known.exists() and (earlier is not None or not accelerator.is_main_process):
        stored = json.loads(known.read_text())
        if stored["made_from"] != key:
            raise UserValueError(
                f"{known} was made from other data or settings ({stored['made_from']}) than this run's ({key}). Resume "
                "with those, or choose another --output_dir."
            )
        if known != path and accelerator.is_main_process:
            _write(stored, path)
    elif earlier is not None:
        raise UserValueError(
            f"{earlier} holds checkpoints of a run without --reweighted_contexts. Leave the argument out, or choose "
            "another --output_dir."
        )
    elif not accelerator.is_main_process:
        raise FileNotFoundError(f"{path} is not here. All processes must share the folder --output_dir.")
    else:
        drawn = _drawn(data, contexts, wanted, arguments, accelerator, extract_features)
        doubted = [d for d in drawn if d.doubt]
        say(table(drawn), table(doubted) if doubted else "")
        stored = {"made_from": key, "contexts": {str(d.context): _to_json(d) for d in drawn}}
        _write(stored, path)
    rows = {name: np.array(entry["rows"], np.int64) for name, entry in stored["contexts"].items() if entry["rows"]}
    return dataclasses.replace(data, reweighted=rows)


def _write(stored: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, path.parent, json.dumps(stored) + "\n")


def _drawn(
    data: InterventionalData,
    contexts: list[str],
    wanted: Sequence[Context],
    arguments: AdapterArguments,
    accelerator: Accelerator,
    extract_features: Callable[[Dataset], Tensor],
) -> list[ReweightedContext]:
    """Estimate the density ratios, kept in the output folder, and draw rows of the wanted combinations by them."""
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is found now
    with accelerator.autocast():
        features = extract_features(cast(Dataset, data.rows))
    with _told_interruption(ratios := output_dir / RATIOS):
        return reweight(
            features,
            contexts,
            data.concepts,
            wanted,
            seed=arguments.seed,
            input_noise=_INPUT_NOISE,
            dropout=_DROPOUT,
            device=accelerator.device,
            keep_in=ratios,
        )


@contextmanager
def _told_interruption(ratios: Path) -> Iterator[None]:
    """Within the body, Ctrl-C says whether anything that was estimated is kept.

    Raises:
        KeyboardInterrupt: saying so.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = f"Those made so far are kept in {ratios}. Go on" if ratios.exists() else "None is kept yet. Start anew"
        raise KeyboardInterrupt(
            f"Interrupted while density ratios were estimated. {kept} by running the same command again."
        ) from None


def table(drawn: Sequence[ReweightedContext]) -> str:
    """What the data supports, as text: the effective sample size of every combination, and what to do about it."""
    width = max(len(str(d.context)) for d in drawn)
    lines = ["Combinations drawn from the training rows (effective sample size):"]
    for d in drawn:
        # Where sets share no look, weights are equal for want of any that fits: not a size to be shown.
        size = "-" if d.doubt and d.doubt.kind in ("alike", "apart") else f"{d.effective_sample_size:.0f}"
        note = f"  {d.doubt.reason}; not trained on, left to the mechanism" if d.doubt else ""
        lines.append(f"  {d.context!s:<{width}}  {size:>9}{note}")
    for kind, advice in _ADVICE.items():
        if doubts := {str(d.context): d.doubt for d in drawn if d.doubt and d.doubt.kind == kind}:
            concepts = quoted(dict.fromkeys(name for doubt in doubts.values() for name in doubt.concepts))
            lines.append(advice.format(combinations=", ".join(doubts), concepts=concepts))
    return "\n".join(lines)


def _to_json(drawn: ReweightedContext) -> dict[str, Any]:
    size, mass = round(drawn.effective_sample_size, 1), round(drawn.mass, 3)
    doubt = drawn.doubt.reason if drawn.doubt else None
    return {"effective_sample_size": size, "mass": mass, "doubt": doubt, "rows": drawn.rows.tolist()}
