"""What a run says of its base at its start: measured once, printed, and kept beside the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from .._files import BASE_GAP, first_line
from ..bases.gap import BaseGap
from ..errors import is_out_of_memory
from ..messages.progress import say
from .arguments import AdapterArguments
from .loop.checkpoints import earlier_run, write_text


class NotMeasuredError(Exception):
    """A base was not compared with the observational set; its argument says why."""

    def __str__(self) -> str:
        return f"The base was not compared with your observational set ({self.args[0]})."


def report_gap(accelerator: Accelerator, arguments: AdapterArguments, measure: Callable[[], BaseGap]) -> BaseGap | None:
    """In the main process, print how far the base is from the observational set; a resumed run does not measure again.

    None in other processes, and where it is not measured: for a base in pieces, and for lack of memory.
    """
    if not accelerator.is_main_process:
        return None
    earlier = earlier_run(arguments)
    gap = BaseGap.load(earlier) if earlier is not None else None
    try:
        if gap is None and arguments.shard_base:
            raise NotMeasuredError("--shard_base cuts the base into pieces")
        gap = gap or measured(measure)
    except NotMeasuredError as reason:
        print(str(reason), flush=True)
        return None
    advice = gap.advice(arguments.observational_rank)
    say(advice, advice if advice.startswith("WARNING") else "")
    return gap


def measured(measure: Callable[[], BaseGap]) -> BaseGap:
    """Return what is measured.

    Raises:
        NotMeasuredError: for lack of memory, and where losses are no numbers.
    """
    try:
        gap = measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotMeasuredError(f"it ran out of memory: {first_line(error)}") from error
    if not all(0 < loss < math.inf for loss in (gap.on_set, gap.on_samples)):
        raise NotMeasuredError(f"its loss is {gap.on_set} on it, and {gap.on_samples} on samples of its own")
    return gap


def record_gap(gap: BaseGap | None, folder: Path) -> dict[str, float]:
    """Write base_gap.json, if there is something to write, and return the numbers for trackers.

    Raises:
        CheckpointError: when it cannot be written.
    """
    if gap is None:
        return {}
    write_text(folder / BASE_GAP, folder, gap.json())
    return {"base_gap/on_set": gap.on_set, "base_gap/on_own_samples": gap.on_samples, "base_gap/times": gap.times}
