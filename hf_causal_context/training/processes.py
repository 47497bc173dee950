"""Several processes that train one model: what the others do when one of them fails or is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed import DistError

from .checkpoints import last_checkpoint

# How gloo, whose errors have no class of their own, says that a process is gone or silent.
_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting|[Ss]ocket [Tt]imeout")


class ProcessLostError(ConnectionError):
    """Another process of the run failed, was killed or does not answer."""


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
