"""The training loop: one for every base and objective, from the first batch to the saved adapter."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from .arguments import TrainingArguments
from .checkpoints import (
    check_same_run,
    check_space,
    checkpoint_steps,
    clean_up,
    find_checkpoint,
    last_checkpoint,
    not_written,
    register_adapter_hooks,
    remove_checkpoint,
    save_checkpoint,
)
from .interruption import noted_interruptions
from .objectives import Objective


class TrainingDivergedError(FloatingPointError):
    """A loss or a gradient became NaN or infinite; nothing was saved after it."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; a checkpoint was saved."""


def make_accelerator(arguments: TrainingArguments) -> Accelerator:
    """Accelerate's view of the processes and devices of this run.

    Raises:
        ValueError: for a tracker that is not installed, or fp16 without a GPU.
    """
    # Under torchrun without an accelerator, Accelerate runs every process on its own unless told to use the CPU.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=several and not torch.accelerator.is_available(),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.report_to,
        # The others wait while the main process checks pictures, fills caches and draws grids.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        project_config=ProjectConfiguration(
            arguments.output_dir, str(Path(arguments.output_dir, arguments.logging_dir))
        ),
    )
    if arguments.report_to and not accelerator.log_with:
        raise ValueError(
            f"--report_to={arguments.report_to}: this tracker is not installed, so nothing would be logged. Install it "
            "(pip install ...), or leave the argument out."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision=fp16 needs a GPU. On the CPU use bf16 or no.")
    return accelerator


def fit(
    accelerator: Accelerator,
    model: PeftModel,
    objective: Objective,
    batches: Callable[[int], Iterator[Any]],
    arguments: TrainingArguments,
    num_steps: int,
    validate: Callable[[int], None] | None = None,
) -> Path:
    """Train the parameters of `model` that require gradients, and save the adapter to `output_dir`.

    Args:
        accelerator: from `make_accelerator`.
        model: the base with its adapter.
        objective: batch -> losses (B,).
        batches: endless batches of this process from the n-th on; the n-th is the same in every run.
        arguments: the run's settings.
        num_steps: optimiser steps of the whole run.
        validate: called with the step, in eval mode and with the weights that would be saved.

    Raises:
        TrainingDivergedError: when a loss or gradient becomes NaN or infinite.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after saving a checkpoint.
        CheckpointError: when a checkpoint cannot be written.
        FileNotFoundError: for a checkpoint to resume from that does not exist.
        FileExistsError: for checkpoints of another run in `output_dir`.
        ValueError: for a checkpoint of a run with other settings.
    """
    output_dir = Path(arguments.output_dir)
    parameters = [p for p in model.parameters() if p.requires_grad]
    resumed = arguments.resume_from_checkpoint
    found = find_checkpoint(output_dir, resumed) if resumed else None
    if found is not None:
        check_same_run(found[1], arguments, model)
    elif resumed:
        accelerator.print(f"There is no checkpoint in {output_dir} yet: the run starts from the beginning.")
    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        clean_up(output_dir)
        if not resumed and checkpoint_steps(output_dir):
            raise FileExistsError(
                f"{output_dir} holds checkpoints of another run. Go on with it by --resume_from_checkpoint latest, "
                "remove them, or choose another --output_dir."
            )
        copies = 4 if arguments.use_ema else 3  # the weights, AdamW's two moments, the average
        check_space(output_dir, copies * sum(4 * p.numel() for p in parameters))
        arguments.save(output_dir)

    # 1. Everything that a checkpoint holds
    optimizer = torch.optim.AdamW(
        parameters,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        weight_decay=arguments.adam_weight_decay,
        eps=arguments.adam_epsilon,
    )
    schedule = get_scheduler(
        arguments.lr_scheduler, optimizer, num_warmup_steps=arguments.lr_warmup_steps, num_training_steps=num_steps
    )
    register_adapter_hooks(accelerator)
    accelerator.register_for_checkpointing(schedule)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ema = (
        EMAModel(parameters, decay=arguments.ema_decay, use_ema_warmup=True, power=0.75) if arguments.use_ema else None
    )
    if ema is not None:
        accelerator.register_for_checkpointing(ema)

    # 2. Where to begin
    first = 0
    if found is not None:
        first, folder = found
        accelerator.load_state(str(folder))
        if ema is not None:
            ema.to(accelerator.device)
        set_learning_rate(schedule, arguments.learning_rate)
        accelerator.print(f"Resumed from {folder}.")
        if accelerator.is_main_process:  # what came after it belongs to a run that is given up
            for step, later in checkpoint_steps(output_dir).items():
                if step > first:
                    remove_checkpoint(later)
    if arguments.report_to:
        settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(arguments).items()}
        accelerator.init_trackers("hf_causal_context", settings)

    def stopped(problem: str, step: int) -> TrainingDivergedError:
        rate = schedule.get_last_lr()[0]
        return TrainingDivergedError(
            f"{problem} at step {step + 1} (learning rate {rate:.3g}). Nothing was saved after it. "
            f"{last_checkpoint(output_dir)} Resume from it, or start anew, with a lower --learning_rate or "
            "--max_grad_norm; the same settings would end here again."
        )

    def validated(step: int) -> None:
        if validate is not None and accelerator.is_main_process:
            wrapped.eval()
            with averaged(ema, parameters):
                validate(step)
            wrapped.train()
        accelerator.wait_for_everyone()

    # 3. The loop
    wrapped.train()
    accumulation = arguments.gradient_accumulation_steps
    stream = batches(first * accumulation)
    bar = tqdm(total=num_steps, initial=first, desc="train", unit="step", disable=not accelerator.is_local_main_process)
    with noted_interruptions() as interruption, bar:
        for step in range(first, num_steps):
            total = torch.zeros((), device=accelerator.device)
            for _ in range(accumulation):
                batch = next(stream)
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast():
                        loss = objective(wrapped, batch).mean()
                    accelerator.backward(loss)
                    total += loss.detach() / accumulation
            value = cast(Tensor, accelerator.reduce(total, "mean")).item()
            if not math.isfinite(value):
                raise stopped(f"The loss became {value}", step)
            norm = cast(Tensor, accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)).item()
            if not math.isfinite(norm) and accelerator.mixed_precision != "fp16":  # whose scaler skips the step
                raise stopped(f"The gradient's norm became {norm}", step)
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # by the scaler of fp16
                schedule.step()
                if ema is not None:
                    ema.step(parameters)
            optimizer.zero_grad()
            done = step + 1
            rate = schedule.get_last_lr()[0]
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.2g}")
            accelerator.log({"loss": value, "learning_rate": rate, "gradient_norm": norm}, step=done)
            if interruption.signal:
                accelerator.set_trigger()
            interrupted = accelerator.check_trigger()
            if interrupted or done % arguments.checkpointing_steps == 0 or done == num_steps:
                save_checkpoint(accelerator, arguments, done)
            if interrupted and done < num_steps:
                accelerator.end_training()
                how = "again" if resumed == "latest" else "with --resume_from_checkpoint latest"
                raise TrainingInterrupted(
                    f"Stopped after step {done} of {num_steps}. {last_checkpoint(output_dir)} Go on by running the "
                    f"same command {how}."
                )
            if arguments.validation_steps and done % arguments.validation_steps == 0 and done < num_steps:
                validated(done)

    # 4. The result: what is saved is what the model goes on with
    if ema is not None:
        ema.copy_to(parameters)
    if accelerator.is_main_process:
        save_adapter(accelerator.unwrap_model(wrapped), output_dir)
    validated(num_steps)
    accelerator.end_training()
    return output_dir


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


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter's files into a folder that holds other things too; each appears complete or not at all.

    Raises:
        CheckpointError: when they cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as unfinished:
            model.save_pretrained(unfinished, save_embedding_layers=False)
            for path in Path(unfinished).iterdir():
                path.replace(folder / path.name)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise not_written(folder / "adapter_model.safetensors", folder, error) from error
