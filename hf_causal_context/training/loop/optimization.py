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

from ..optimization_arguments import OptimizationArguments
from ..optimizers import optimizer_by_name
from .parts import adapted_models


def parameter_groups(model: nn.Module, arguments: OptimizationArguments) -> list[dict[str, Any]]:
    """Return what is trained, with its peak learning rate: the parameters of the model, then of text encoders."""
    trained = [p for p in model.parameters() if p.requires_grad]
    main = set(adapted_models(model).get("", model).parameters())
    groups = [p for p in trained if p in main], [p for p in trained if p not in main]
    return [{"params": own, "lr": peak} for own, peak in zip(groups, _peaks(arguments), strict=True) if own]


def _peaks(arguments: OptimizationArguments) -> tuple[float, float]:
    rate = arguments.learning_rate
    return rate, getattr(arguments, "text_encoder_learning_rate", None) or rate


def make_optimizer(
    groups: list[dict[str, Any]], arguments: OptimizationArguments, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """Make the optimizer of a run; see `optimizer_by_name` for what it raises."""
    settings: dict[str, Any] = {"lr": arguments.learning_rate}
    if arguments.optimizer.startswith("adamw"):
        settings |= {
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "weight_decay": arguments.adam_weight_decay,
            "eps": arguments.adam_epsilon,
        }
    if arguments.optimizer == "adamw":
        # One kernel for all parameters. With fp16's scaler it would skip steps without Accelerate seeing it.
        fused = accelerator.device.type == "cuda" and accelerator.mixed_precision != "fp16"
        settings["fused"] = True if fused else None
    return optimizer_by_name(arguments.optimizer, groups, arguments.optimizer_args, **settings)


def unfinished_warm_up(arguments: OptimizationArguments, num_steps: int) -> str:
    """Say that a run ends before its learning rate has risen to what was asked for; empty where it does not."""
    if arguments.lr_scheduler == "constant" or arguments.lr_warmup_steps < num_steps:
        return ""
    return (
        f"The run has {num_steps} optimizer steps, all of them within --lr_warmup_steps={arguments.lr_warmup_steps}. "
        "Lower it or --train_batch_size, or train longer (--num_train_epochs, --max_train_steps)."
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
def averaged(optimizer: Any, ema: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the body, the parameters are their average over steps, if the optimizer or `ema` keeps one."""
    with averaged_by(optimizer):
        if ema is None:
            yield
            return
        ema.store(parameters)
        ema.copy_to(parameters)
        try:
            yield
        finally:
            ema.restore(parameters)


@contextmanager
def averaged_by(optimizer: Any) -> Iterator[None]:
    """Within the body, the parameters are the average that a schedule-free optimizer keeps (Defazio et al., 2024)."""
    averages = any(group.get("train_mode") for group in optimizer.param_groups)
    if averages:
        optimizer.eval()
    try:
        yield
    finally:
        if averages:
            optimizer.train()


def set_learning_rates(schedule: Any, arguments: OptimizationArguments) -> None:
    """Give a restored schedule the peak rates of this run; nothing changes when they are the same."""
    peaks = schedule.base_lrs = list(_peaks(arguments))[: len(schedule.base_lrs)]
    for group, factor, peak in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, peaks, strict=True):
        group["initial_lr"], group["lr"] = peak, peak * factor(schedule.last_epoch)
