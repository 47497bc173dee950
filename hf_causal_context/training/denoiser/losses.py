"""A denoiser's loss on a few rows of each context, always with the same noise, so that validations can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from ...bases.diffusion_base import DiffusionBase
from ..arguments import TrainingArguments
from ..context_losses import ContextLosses
from ..few_rows import part_of
from ..loop.objective import Objective
from ..noise import LevelDraws
from .batches import DenoiserBatches
from .objectives import Batch, denoising_objective
from .text_encoders import with_encoders

MOST_ROWS = 32  # of a context
MOST_IN_ALL = 512  # of all contexts, unless that leaves fewer than 4 each
_AT_ONCE = 8


def denoising_losses(
    accelerator: Accelerator,
    base: DiffusionBase,
    model: nn.Module,
    batches: DenoiserBatches,
    arguments: TrainingArguments,
    contexts: Sequence[str],
    held_out: bool,
) -> ContextLosses:
    """Return what measures and tells the losses of contexts; every row has a time step of its own, spread over all.

    Raises:
        ValueError: for a stream without rows of a context.
    """
    objective: Objective = denoising_objective(base, arguments.snr_gamma)
    if arguments.train_text_encoder:
        objective = with_encoders(objective)

    @torch.no_grad()
    def loss(rows: Batch) -> float:
        total, num = 0.0, len(rows.clean)
        for start in range(0, num, _AT_ONCE):
            slots = range(start, min(start + _AT_ONCE, num))
            draws = LevelDraws(arguments.seed, slots, [(slot + 0.5) / num for slot in slots])
            with accelerator.autocast():
                total += float(objective(model, part_of(rows, slots, draws, accelerator.device)).sum())
        return total / num

    num = max(4, min(MOST_ROWS, MOST_IN_ALL // max(1, len(contexts))))
    few = {context: batches.few(context, num) for context in contexts}
    return ContextLosses(
        accelerator,
        arguments,
        "denoising loss",
        {context: partial(loss, rows) for context, rows in few.items()},
        held_out=held_out,
    )
