"""Lack of memory, of the device or of the machine: a message that says what needs less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from ..._files import first_line
from ...errors import UserError, is_out_of_memory
from ..optimization_arguments import OptimizationArguments
from .checkpoints import last_checkpoint


class TrainingMemoryError(UserError, MemoryError):
    """There is not enough memory for the base, a step or a validation."""


@contextmanager
def explain_oom(what: str, advice: Callable[[], str]) -> Iterator[None]:
    """Within the body, lack of memory is an error that says what it was for, and gives the advice.

    Raises:
        TrainingMemoryError: instead of what torch, Python or an allocator raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error, TrainingMemoryError):
            raise
        raise TrainingMemoryError(f"{what} ran out of memory ({first_line(error)}). {advice()}") from error


def less_memory(arguments: OptimizationArguments) -> str:
    """Which other settings need less memory, of those that a run has."""
    changes = {"gradient_checkpointing": "", "shard_base": " (several processes)"}
    offered = [f"--{name}{note}" for name, note in changes.items() if getattr(arguments, name, None) is False]
    begin = f"Resume with {' or '.join(offered)}, or start anew with" if offered else "Start anew with"
    return f"{begin} a smaller --train_batch_size and more --gradient_accumulation_steps, or --mixed_precision bf16."


def validation_without_memory(error: BaseException, step: int, output_dir: Path, ends_run: bool) -> str:
    """Say that a validation ran out of memory, and what to do about it."""
    goes_on = "" if ends_run else "Training goes on without it, and tries again when the next is due. "
    resume = " Then resume with --resume_from_checkpoint latest." if ends_run else ""
    return (
        f"Validation ran out of memory at step {step} ({first_line(error)}). {goes_on}{last_checkpoint(output_dir)} "
        "Let it make less at once: fewer --num_validation_images or --num_validation_texts, or a smaller "
        f"--max_new_tokens.{resume}"
    )


def memory_for_base(device: torch.device, arguments: OptimizationArguments) -> AbstractContextManager[None]:
    """`explain_oom` the base on its device."""
    whole = getattr(arguments, "shard_base", None) is False
    pieces = "cut the base into pieces: several processes with --shard_base" if whole else "more processes"
    return explain_oom(f"Placing the base on {device}", lambda: f"Take --mixed_precision bf16, or {pieces}.")
