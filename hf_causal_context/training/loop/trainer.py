"""The training loop: one for every model and objective, from the first batch to the saved result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ..._files import checkpoint_steps, first_line
from ..arguments import OptimisationArguments
from .checkpoints import (
    check_same_run,
    check_space,
    clean_up,
    find_checkpoint,
    last_checkpoint,
    register_model_hooks,
    remove_checkpoint,
    save_checkpoint,
    save_model,
)
from .early_stopping import EarlyStopping
from .interruption import noted_interruptions
from .memory import TrainingMemoryError, is_out_of_memory, less_memory, memory_for
from .objective import Objective
from .processes import watched_processes
from .sharding import is_sharded
from .trackers import start_trackers


class TrainingDivergedError(FloatingPointError):
    """A loss or a gradient became NaN or infinite; nothing was saved after it."""


class UnreadableDataError(ValueError):
    """The data could be read before the training, but not during it."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; a checkpoint was saved."""


class StepHooks:
    """What a model needs around the steps of its training; does nothing unless a subclass does."""

    def start_step(self, step: int) -> None:
        """Before the forward passes of an optimiser step, counted from 0."""

    def end_backward(self) -> None:
        """When the gradients of a step are complete, before they are clipped."""

    def end_step(self) -> None:
        """After the optimiser changed the parameters."""


def fit(
    accelerator: Accelerator,
    model: PeftModel | ModelMixin,
    objective: Objective,
    batches: Callable[[int], Iterator[Any]],
    arguments: OptimisationArguments,
    num_steps: int,
    validate: Callable[[int], float | None] | None = None,
    early_stopping: EarlyStopping | None = None,
    hooks: StepHooks | None = None,
    finish: Callable[[Path], object] | None = None,
    begin: Callable[[int], Mapping[str, float]] | None = None,
) -> Path:
    """Train the parameters of `model` that require gradients, and save the model to `output_dir`.

    Args:
        accelerator: from `make_accelerator`.
        model: a base with its adapter, of which only the adapter is saved, or a whole model.
        objective: batch -> losses (B,).
        batches: endless batches of this process from the n-th on; the n-th is the same in every run.
        arguments: the run's settings.
        num_steps: optimiser steps of the whole run.
        validate: called with the step, in eval mode and with the weights that would be saved; may return a loss. If it
            runs out of memory, the training goes on without it. Called in the main process; in all if the model is
            sharded, and then memory must suffice.
        early_stopping: looks at that loss.
        hooks: what happens around every step.
        finish: writes what belongs beside the model, in the main process; before the last validation, which may fail.
        begin: called in the main process before the first step, with the number of steps that are done already; what
            it returns is logged.

    Raises:
        TrainingDivergedError: when a loss or gradient becomes NaN or infinite.
        TrainingMemoryError: when a step does not fit into memory, or a validation of a sharded model.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after saving a checkpoint.
        UnreadableDataError: when batches can no longer be made.
        ProcessLostError: when another process of the run is gone.
        CheckpointError: when a checkpoint cannot be written, or is damaged.
        FileNotFoundError: for a checkpoint to resume from that does not exist.
        FileExistsError: for checkpoints of another run in `output_dir`.
        ValueError: for a checkpoint of a run with other settings.
    """
    hooks, finish = hooks or StepHooks(), finish or (lambda folder: None)
    begin = begin or (lambda first: {})
    with watched_processes(accelerator, Path(arguments.output_dir)):
        return _fit(
            accelerator, model, objective, batches, arguments, num_steps, validate, early_stopping, hooks, finish, begin
        )


def _fit(
    accelerator: Accelerator,
    model: PeftModel | ModelMixin,
    objective: Objective,
    batches: Callable[[int], Iterator[Any]],
    arguments: OptimisationArguments,
    num_steps: int,
    validate: Callable[[int], float | None] | None,
    early_stopping: EarlyStopping | None,
    hooks: StepHooks,
    finish: Callable[[Path], object],
    begin: Callable[[int], Mapping[str, float]],
) -> Path:
    output_dir = Path(arguments.output_dir)
    sharded = is_sharded(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    resumed = arguments.resume_from_checkpoint
    found = find_checkpoint(output_dir, resumed, accelerator.print) if resumed else None
    if found is not None:
        check_same_run(found[1], arguments, model, accelerator.num_processes)
    elif resumed:
        accelerator.print(f"There is no checkpoint in {output_dir} yet: the run starts from the beginning.")
    output_dir.mkdir(parents=True, exist_ok=True)
    known: Mapping[str, float] = {}
    if accelerator.is_main_process:
        clean_up(output_dir)
        if not resumed and checkpoint_steps(output_dir):
            raise FileExistsError(
                f"{output_dir} holds checkpoints of another run. Go on with it by --resume_from_checkpoint latest, "
                "remove them, or choose another --output_dir."
            )
        copies = 4 if arguments.use_ema else 3  # the weights, AdamW's two moments, the average
        whole = () if isinstance(model, PeftModel) else model.parameters()
        frozen = sum(p.numel() for p in whole if not p.requires_grad)
        check_space(output_dir, 4 * frozen + copies * sum(4 * p.numel() for p in parameters))
        arguments.save(output_dir)
        known = begin(found[0] if found else 0)

    # 1. Everything that a checkpoint holds
    optimizer = torch.optim.AdamW(
        parameters,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        weight_decay=arguments.adam_weight_decay,
        eps=arguments.adam_epsilon,
        # One kernel for all parameters. With fp16's scaler it would skip steps without Accelerate seeing it.
        fused=True if accelerator.device.type == "cuda" and accelerator.mixed_precision != "fp16" else None,
    )
    schedule = make_schedule(optimizer, arguments, num_steps)
    register_model_hooks(accelerator)
    accelerator.register_for_checkpointing(schedule)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ema = (
        EMAModel(parameters, decay=arguments.ema_decay, use_ema_warmup=True, power=0.75) if arguments.use_ema else None
    )
    for state in (ema, early_stopping):
        if state is not None:
            accelerator.register_for_checkpointing(state)

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
        start_trackers(accelerator, settings, output_dir, arguments.report_to)
        for tracker in accelerator.trackers if known else ():
            tracker.log(known, step=first)

    def stopped(problem: str, step: int) -> TrainingDivergedError:
        rate = schedule.get_last_lr()[0]
        return TrainingDivergedError(
            f"{problem} at step {step + 1} (learning rate {rate:.3g}). Nothing was saved after it. "
            f"{last_checkpoint(output_dir)} Resume from it, or start anew, with a lower --learning_rate or "
            "--max_grad_norm; the same settings would end here again."
        )

    told: set[type[Exception]] = set()

    def validated(step: int) -> bool:
        """Whether the run should end."""
        stop = torch.zeros((), device=accelerator.device)
        if validate is not None and (sharded or accelerator.is_main_process):
            loss = None
            wrapped.eval()
            try:
                # Samples come in other shapes than batches, so code would be compiled anew for them.
                eager = torch.compiler.set_stance("force_eager") if arguments.compile else nullcontext()
                with eager, averaged(ema, parameters):
                    loss = validate(step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = f"Validation ran out of memory at step {step} ({first_line(error)})."
                less = (
                    "Let it make less at once: fewer --num_validation_images or --num_validation_texts, or a smaller "
                    "--max_new_tokens."
                )
                if sharded:  # the other processes wait for this one's pieces
                    raise TrainingMemoryError(
                        f"{said} {last_checkpoint(output_dir)} {less} Then resume with --resume_from_checkpoint latest."
                    ) from error
                if type(error) not in told:
                    accelerator.print(
                        f"{said} Training goes on without it, and tries again when the next is due. "
                        f"{last_checkpoint(output_dir)} {less}"
                    )
                told.add(type(error))
            finally:
                wrapped.train()
            if told:
                clear_device_cache(garbage_collection=True)  # what a failed one held
            if loss is not None:
                accelerator.log({"validation_loss": loss}, step=step)
                stop += early_stopping is not None and early_stopping.should_stop(loss)
        if early_stopping is not None:
            stop = cast(Tensor, accelerator.reduce(stop, "sum"))
        accelerator.wait_for_everyone()
        return bool(stop.item())

    def read(step: int) -> Any:
        """The next batch."""
        try:
            return next(stream)
        except Exception as error:  # decoders raise whatever they like
            of_device = isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)
            if of_device or isinstance(error, MemoryError):
                raise
            raise UnreadableDataError(
                f"The data of step {step + 1} cannot be read: {error} {last_checkpoint(output_dir)} Put back what was "
                "there when the run began (if a worker was killed: lower --dataloader_num_workers, which takes less "
                "memory), then resume with --resume_from_checkpoint latest."
            ) from error

    def is_due(step: int) -> bool:
        return bool(arguments.validation_steps) and step % arguments.validation_steps == 0 and 0 < step < num_steps

    # 3. The loop
    wrapped.train()
    accumulation = arguments.gradient_accumulation_steps
    stream = batches(first * accumulation)
    bar = tqdm(total=num_steps, initial=first, desc="train", unit="step", disable=not accelerator.is_local_main_process)
    # A checkpoint is written before its step's validation, so a resumed run begins with that.
    stopping, done = is_due(first) and validated(first), first
    with noted_interruptions() as interruption, bar:
        while done < num_steps and not stopping:
            step = done
            hooks.start_step(step)
            total = torch.zeros((), device=accelerator.device)
            with memory_for(f"Step {step + 1}", lambda: f"{last_checkpoint(output_dir)} {less_memory(arguments)}"):
                for _ in range(accumulation):
                    batch = read(step)
                    with accelerator.accumulate(wrapped):
                        with accelerator.autocast():
                            loss = objective(wrapped, batch).mean()
                        accelerator.backward(loss)
                        total += loss.detach() / accumulation
                value = cast(Tensor, accelerator.reduce(total, "mean")).item()
                if not math.isfinite(value):
                    raise stopped(f"The loss became {value}", step)
                hooks.end_backward()
                norm = cast(Tensor, accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)).item()
                if not math.isfinite(norm) and accelerator.mixed_precision != "fp16":  # whose scaler skips the step
                    raise stopped(f"The gradient's norm became {norm}", step)
                optimizer.step()
            hooks.end_step()
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
            stopping = is_due(done) and validated(done)
    if stopping:
        accelerator.print(f"Validation no longer improves: stopped after step {done} of {num_steps}.")

    # 4. The result: what is saved is what the model goes on with
    if ema is not None:
        ema.copy_to(parameters)
    if accelerator.is_main_process:
        save_model(accelerator.unwrap_model(wrapped), output_dir)
        finish(output_dir)
    validated(done)
    accelerator.end_training()
    return output_dir


def make_schedule(optimizer: torch.optim.Optimizer, arguments: OptimisationArguments, num_steps: int) -> LambdaLR:
    """The schedule of the learning rate; the cosine with a minimum ends at a hundredth of the peak."""
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
