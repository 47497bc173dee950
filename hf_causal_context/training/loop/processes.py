"""The processes that train one model, and what the others do when one of them fails or is gone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, LoggerType, ProjectConfiguration, broadcast
from torch import Tensor
from torch.distributed import DistError

from ...errors import UserValueError
from ..optimization_arguments import OptimizationArguments
from .checkpoints import check_writable, last_checkpoint
from .sharding import check_configuration, check_processes

# How gloo, whose errors have no class of their own, says that a process is gone or silent.
_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting|[Ss]ocket [Tt]imeout")

# Marks Accelerate's state as that of a run, and not of an Accelerator that the caller made.
_OF_A_RUN = "of_a_causal_context_run"


class ProcessLostError(ConnectionError):
    """Another process of the run failed, was killed or does not answer."""


def make_accelerator(arguments: OptimizationArguments) -> Accelerator:
    """Accelerate's view of the processes and devices of this run.

    Raises:
        ValueError: for a tracker that is unknown or not installed, fp16 without a GPU, or a way to shard that is not
            supported.
        CheckpointError: for an `output_dir` that cannot be written to.
    """
    trackers = list(map(str, LoggerType))
    if arguments.report_to and arguments.report_to not in trackers:
        raise UserValueError(f"--report_to={arguments.report_to} is unknown. Allowed: {', '.join(trackers)}.")
    check_writable(Path(arguments.output_dir))
    check_configuration(arguments)
    # Accelerate keeps what the first run of a process was told for all that follow, in a notebook say: its precision.
    if AcceleratorState._shared_state.get(_OF_A_RUN):
        AcceleratorState._reset_state()
    # Under torchrun without an accelerator, Accelerate runs every process on its own unless told to use the CPU.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=several and not torch.accelerator.is_available(),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.report_to,
        # The others wait while the main process checks images, fills caches and draws grids.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        project_config=ProjectConfiguration(
            arguments.output_dir, str(Path(arguments.output_dir, arguments.logging_dir))
        ),
    )
    AcceleratorState._shared_state[_OF_A_RUN] = True
    check_processes(arguments)
    if arguments.report_to and not accelerator.log_with:
        raise UserValueError(
            f"--report_to={arguments.report_to}: this tracker is not installed, so nothing would be logged. Install it "
            "(pip install ...), or leave the argument out."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserValueError("--mixed_precision=fp16 needs a GPU. On the CPU use bf16 or no.")
    return accelerator


def is_lost_process(error: BaseException) -> bool:
    """Whether an error of a collective operation says that another process is gone."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None)


@contextmanager
def watched_processes(accelerator: Accelerator, output_dir: Path) -> Iterator[None]:
    """Within the body, what a collective operation raises when another process is gone says what to do.

    Raises:
        ProcessLostError: instead.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not is_lost_process(error):
            raise
        said = _GONE.search(str(error))
        raise _lost(said[0] if said else type(error).__name__, output_dir) from error


@contextmanager
def main_process_first(accelerator: Accelerator, output_dir: Path) -> Iterator[None]:
    """The main process goes through the body before the others; if it fails there, they fail too, and do not wait.

    Raises:
        ProcessLostError: in the others.
    """
    if accelerator.num_processes == 1:
        yield
        return
    failed = torch.ones((), device=accelerator.device)
    if not accelerator.is_main_process:
        with watched_processes(accelerator, output_dir):
            failed = cast(Tensor, broadcast(failed))
        if failed.item():
            raise _lost("it failed before the training", output_dir)
    try:
        yield
        failed.zero_()
    finally:
        if accelerator.is_main_process:
            with watched_processes(accelerator, output_dir):
                broadcast(failed)


def _lost(reason: str, output_dir: Path) -> ProcessLostError:
    return ProcessLostError(
        f"Another process of this run has failed, was killed or does not answer ({reason}). "
        f"{last_checkpoint(output_dir)} What that process printed says why; one that was killed prints nothing, and "
        "lack of memory is the usual cause. Then start all processes again by the same command, with "
        "--resume_from_checkpoint latest."
    )
