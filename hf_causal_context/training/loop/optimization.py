"""What changes the trained parameters: the optimizer, its learning rate and the moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..arguments import OptimizationArguments


def make_optimizer(
    parameters: list[nn.Parameter], arguments: OptimizationArguments, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """Make the AdamW of a run."""
    return torch.optim.AdamW(
        parameters,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        weight_decay=arguments.adam_weight_decay,
        eps=arguments.adam_epsilon,
        # One kernel for all parameters. With fp16's scaler it would skip steps without Accelerate seeing it.
        fused=True if accelerator.device.type == "cuda" and accelerator.mixed_precision != "fp16" else None,
    )


def make_schedule(optimizer: torch.optim.Optimizer, arguments: OptimizationArguments, num_steps: int) -> LambdaLR:
    """Make the schedule of the learning rate; the cosine with a minimum ends at a hundredth of the peak."""
    if arguments.lr_scheduler == "cosine_with_min_lr":
        from transformers import get_cosine_with_min_lr_schedule_with_warmup

        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, arguments.lr_warmup_steps, num_steps, min_lr_rate=0.01
        )
    return get_scheduler(
        arguments.lr_scheduler, optimizer, num_warmup_steps=arguments.lr_warmup_steps, num_training_steps=num_steps
    )


@contextmanager
def averaged(ema: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the body, the parameters are their moving average, if there is one."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def set_learning_rate(schedule: Any, peak: float) -> None:
    """Give a restored schedule the peak rate of this run; nothing changes when it is the same."""
    schedule.base_lrs = [peak] * len(schedule.base_lrs)
    for group, factor in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = peak, peak * factor(schedule.last_epoch)
