"""The training loop: one for every model and objective, from the first batch to the saved result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..._files import checkpoint_steps
from ...errors import UserError, UserValueError, is_out_of_memory
from ...messages.progress import ProgressBar, say
from ..optimization_arguments import OptimizationArguments
from .checkpoints import (
    last_checkpoint,
    open_output_dir,
    register_model_hooks,
    remove_checkpoint,
    save_checkpoint,
    save_model,
)
from .corruption import begun_steps
from .early_stopping import EarlyStopping
from .hooks import StepHooks
from .interruption import noted_interruptions
from .loss_record import LossRecord
from .memory import TrainingMemoryError, explain_oom, less_memory, validation_without_memory
from .objective import Objective
from .optimization import averaged, averaged_by, make_optimizer, make_schedule, parameter_groups, set_learning_rates
from .processes import watched_processes
from .sharding import is_sharded
from .trackers import start_trackers
from .untrained import Untrained

# The host waits for the device, and the processes for each other, once in so many steps: the wait is then next to
# nothing. Where steps are slow it is once in about a second, so that whoever watches or stops a run does not wait long.
STEPS_PER_SYNC, SECONDS_PER_SYNC = 10, 1.0


class TrainingDivergedError(UserError, FloatingPointError):
    """A loss or a gradient became NaN or infinite; nothing was saved after it."""


class UnreadableDataError(UserValueError):
    """The data could be read before the training, but not during it."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; a checkpoint was saved."""


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    batches: Callable[[int], Iterator[Any]],
    arguments: OptimizationArguments,
    num_steps: int,
    validate: Callable[[int], float | None] | None = None,
    early_stopping: EarlyStopping | None = None,
    hooks: StepHooks | None = None,
    finish: Callable[[Path], object] | None = None,
    begin: Callable[[int], Mapping[str, float]] | None = None,
    preview: Callable[[int], None] | None = None,
    kinds: Mapping[str, Tensor] | None = None,
) -> Path:
    """Train the parameters of `model` that require gradients, and save the model to `output_dir`.

    Args:
        accelerator: from `make_accelerator`.
        model: a base with its adapter, or several of a pipeline, of which only the adapter is saved; or a whole model.
        objective: batch -> losses (B,).
        batches: endless batches of this process from the n-th on; the n-th is the same in every run.
        arguments: the run's settings.
        num_steps: optimizer steps of the whole run.
        validate: called with the step, in eval mode and with the weights that would be saved; may return a loss. If it
            runs out of memory, the training goes on without it. Called in the main process; in all if the model is
            sharded, and then memory must suffice.
        early_stopping: looks at that loss.
        hooks: what happens around every step.
        finish: writes what belongs beside the model, in the main process; before the last validation, which may fail.
        begin: called in the main process before the first step, with the number of steps that are done already; what
            it returns is logged.
        preview: called like `validate` where the run begins, before its first step, with 0.
        kinds: of contexts, from `kinds_of_contexts`; the losses of each are shown, logged, and drawn into `output_dir`.

    Raises:
        TrainingDivergedError: when a loss or gradient becomes NaN or infinite.
        TrainingMemoryError: when a step does not fit into memory, or a validation of a sharded model.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after saving a checkpoint.
        UntrainedModulesError: when modules of the adapter take no part in the training.
        UnreadableDataError: when batches can no longer be made.
        ProcessLostError: when another process of the run is gone.
        CheckpointError: when a checkpoint cannot be written, or is damaged.
        FileNotFoundError: for a checkpoint to resume from that does not exist.
        FileExistsError: for checkpoints of another run in `output_dir`.
        ValueError: for a checkpoint of a run with other settings.
    """
    with watched_processes(accelerator, Path(arguments.output_dir)):
        found = open_output_dir(accelerator, model, arguments, num_steps)
        first = found[0] if found is not None else 0
        known = begin(first) if begin is not None and accelerator.is_main_process else {}
        run = Run(accelerator, model, objective, arguments, num_steps, validate, early_stopping, hooks, kinds)
        if found is not None:
            run.resume(*found)
        start_trackers(accelerator, arguments)
        if known:
            accelerator.log(dict(known), step=first)
        if preview is not None and first == 0:
            run.preview(preview)
        run.train(batches)
        return run.save(finish)


class Run:
    """A training run: what its checkpoints hold, and what is done with it. For its arguments, see `fit`."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        arguments: OptimizationArguments,
        num_steps: int,
        validation: Callable[[int], float | None] | None = None,
        early_stopping: EarlyStopping | None = None,
        hooks: StepHooks | None = None,
        kinds: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.accelerator, self.objective, self.arguments, self.num_steps = accelerator, objective, arguments, num_steps
        self.validation, self.early_stopping, self.hooks = validation, early_stopping, hooks or StepHooks()
        self.output_dir, self.sharded = Path(arguments.output_dir), is_sharded(model)
        groups = parameter_groups(model, arguments)
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.untrained = Untrained(model, accelerator.num_processes)
        optimizer = make_optimizer(groups, arguments, accelerator)
        self.schedule = make_schedule(optimizer, arguments, num_steps)
        register_model_hooks(accelerator)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = None
        if arguments.use_ema:
            self.ema = EMAModel(self.parameters, decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
        for state in (self.schedule, self.ema, early_stopping):
            if state is not None:
                accelerator.register_for_checkpointing(state)
        self.without_memory: set[type[Exception]] = set()  # kinds of errors of validations
        # Of the steps that `synchronize` has not seen: the learning rates before and after each, its loss and norm.
        self.rates: list[tuple[list[float], list[float]]] = []
        self.losses, self.norms = torch.zeros(2, STEPS_PER_SYNC, device=accelerator.device)
        self.done, self.begun_steps, self.steps_per_sync, self.steps_per_second = 0, num_steps, 1, 0.0
        self.record = LossRecord(kinds or {}, num_steps, STEPS_PER_SYNC, accelerator.device)

    def resume(self, step: int, checkpoint: Path) -> None:
        """Go on from a checkpoint; those that came after it belong to a run that is given up."""
        self.accelerator.load_state(str(checkpoint))
        self.done, self.begun_steps = step, begun_steps(checkpoint, self.num_steps)
        self.record.load(checkpoint.parent, step)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        set_learning_rates(self.schedule, self.arguments)
        if self.accelerator.is_main_process:
            say(f"Resumed from {checkpoint}.")
            for later, folder in checkpoint_steps(self.output_dir).items():
                if later > step:
                    remove_checkpoint(folder)

    def train(self, batches: Callable[[int], Iterator[Any]]) -> None:
        """Take the steps that are left, with their checkpoints and validations."""
        self.wrapped.train()
        self.optimizer.train()
        self.stream = batches(self.done * self.arguments.gradient_accumulation_steps)
        progress = {"total": self.num_steps, "initial": self.done, "desc": "train", "unit": "step", "delay": 0}
        self.bar = ProgressBar(**progress, disable=not self.accelerator.is_local_main_process)
        # A checkpoint is written before its step's validation, so a resumed run begins with that.
        stopping = self.validation_is_due() and self.validate()
        with noted_interruptions() as self.interruption, self.bar, ExitStack() as at_end:
            if self.accelerator.is_main_process:
                at_end.callback(lambda: self.record.save(self.output_dir, self.done))
            while self.done < self.num_steps and not stopping:
                self.train_until_sync()
                if (interrupted := self.synchronize()) or self.checkpoint_is_due():
                    with averaged_by(self.optimizer):
                        save_checkpoint(self.accelerator, self.arguments, self.done, self.begun_steps)
                    if self.accelerator.is_main_process:
                        self.record.save(self.output_dir, self.done)
                if interrupted and self.done < self.num_steps:
                    self.accelerator.end_training()
                    again = self.arguments.resume_from_checkpoint == "latest"
                    raise TrainingInterrupted(
                        f"Stopped after step {self.done} of {self.num_steps}. {last_checkpoint(self.output_dir)} Go on "
                        f"by running the same command {'again' if again else 'with --resume_from_checkpoint latest'}."
                    )
                stopping = self.validation_is_due() and self.validate()
        if stopping and self.accelerator.is_main_process:
            say(f"Validation no longer improves: stopped after step {self.done} of {self.num_steps}.")
        if report := self.untrained.report():
            self.accelerator.print(report)

    def train_until_sync(self) -> None:
        """Take steps until the next synchronization, which is not later than a checkpoint or a validation."""
        self.began, alone = perf_counter(), self.accelerator.num_processes == 1
        while True:
            try:
                with explain_oom(
                    f"Step {self.done + 1}", lambda: f"{last_checkpoint(self.output_dir)} {less_memory(self.arguments)}"
                ):
                    self.train_step()
            except Exception:
                if alone:  # among several, the others would be waited for
                    self.synchronize()  # what failed may follow from a loss that is not finite
                raise
            due = self.checkpoint_is_due() or self.validation_is_due() or len(self.rates) == self.steps_per_sync
            if due or (alone and self.interruption.signal):
                return

    def train_step(self) -> None:
        """Take one optimizer step; its loss and norm stay on the device until the next synchronization."""
        accelerator, accumulation = self.accelerator, self.arguments.gradient_accumulation_steps
        place = len(self.rates)
        total = self.losses[place].zero_()
        self.record.sums[place].zero_()
        self.hooks.start_step(self.done)
        for _ in range(accumulation):
            batch = self.read_batch()
            with accelerator.accumulate(self.wrapped):
                with accelerator.autocast():
                    losses = self.objective(self.wrapped, batch)
                    loss = losses.mean() * getattr(batch, "weight", 1.0)
                if self.record.names:
                    self.record.add(place, batch.context, losses[: len(batch.context)], getattr(batch, "apart", None))
                accelerator.backward(loss)
                total += loss.detach() / accumulation
        self.hooks.end_backward()
        self.untrained.look(self.done + 1)
        self.norms[place] = cast(Tensor, accelerator.clip_grad_norm_(self.parameters, self.arguments.max_grad_norm))
        before = cast("list[float]", self.schedule.get_last_lr())
        self.optimizer.step()
        self.hooks.end_step()
        if not accelerator.optimizer_step_was_skipped:  # by the scaler of fp16
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        self.optimizer.zero_grad()
        self.done += 1
        self.rates.append((before, cast("list[float]", self.schedule.get_last_lr())))

    def read_batch(self) -> Any:
        """Return the next batch.

        Raises:
            UnreadableDataError: when it can no longer be made.
        """
        try:
            return next(self.stream)
        except Exception as error:  # decoders raise whatever they like
            of_device = isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)
            if of_device or isinstance(error, MemoryError):
                raise
            raise UnreadableDataError(
                f"The data of step {self.done + 1} cannot be read: {error} {last_checkpoint(self.output_dir)} Put "
                "back what was there when the run began (if a worker was killed: lower --dataloader_num_workers, which "
                "takes less memory), then resume with --resume_from_checkpoint latest."
            ) from error

    def synchronize(self) -> bool:
        """Check and log the steps since the last synchronization; return whether a process was interrupted.

        Only here do the loop's steps make the host wait for the device, and the processes communicate besides
        averaging gradients. They also agree on the number of steps until the next time.

        Raises:
            TrainingDivergedError: when a loss or gradient is not finite.
        """
        count = len(self.rates)
        steps = min(STEPS_PER_SYNC, max(1, int(self.steps_per_second * SECONDS_PER_SYNC)))
        own = torch.tensor([bool(self.interruption.signal), steps], dtype=torch.float, device=self.accelerator.device)
        here = torch.cat([own, self.losses[:count], self.record.sums[:count].flatten()])
        means = cast(Tensor, self.accelerator.reduce(here, "mean"))
        interrupted, steps, *values = torch.cat([means, self.norms[:count]]).tolist()
        losses, sums, norms = values[:count], values[count : len(here) - 2], values[len(here) - 2 :]
        self.steps_per_sync = int(steps)
        self.steps_per_second = count / (perf_counter() - self.began)
        seen = zip(losses, norms, self.record.split(sums, count), self.rates, strict=True)
        for step, (loss, norm, own_sums, (before, after)) in enumerate(seen, self.done - count + 1):
            self.check_finite(step, loss, norm, before[0])
            rates = dict(zip(("learning_rate", "text_encoder_learning_rate"), after, strict=False))
            by_kind = self.record.note(step, after[0], own_sums)
            named = {f"loss/{name}": mean for name, mean in by_kind.items()}
            self.accelerator.log({"loss": loss, **named, **rates, "gradient_norm": norm}, step=step)
            shown = by_kind if by_kind.keys().isdisjoint(("loss", "lr")) else named
            self.bar.set_postfix({"loss": loss, **shown, "lr": after[0]}, refresh=False)
        self.bar.update(count)
        self.rates.clear()
        return interrupted > 0

    def check_finite(self, step: int, loss: float, norm: float, rate: float) -> None:
        """Refuse to go on after a step whose loss or gradient is not finite.

        Raises:
            TrainingDivergedError: naming the step.
        """
        if not math.isfinite(loss):
            problem = f"The loss became {loss}"
        elif not math.isfinite(norm) and self.accelerator.mixed_precision != "fp16":  # whose scaler skips the step
            problem = f"The gradient's norm became {norm}"
        else:
            return
        raise TrainingDivergedError(
            f"{problem} at step {step} (learning rate {rate:.3g}). Nothing was saved after it. "
            f"{last_checkpoint(self.output_dir)} Resume from it, or start anew, with a lower --learning_rate or "
            "--max_grad_norm; the same settings would end here again."
        )

    def checkpoint_is_due(self) -> bool:
        """Return whether a checkpoint belongs to the last step."""
        return self.done % self.arguments.checkpointing_steps == 0 or self.done == self.num_steps

    def validation_is_due(self) -> bool:
        """Return whether a validation belongs to the last step; that of the result is extra."""
        every = self.arguments.validation_steps
        return bool(every) and self.done % every == 0 and 0 < self.done < self.num_steps

    def validate(self) -> bool:
        """Validate, and return whether the run should end."""
        stop = torch.zeros((), device=self.accelerator.device)
        if self.validation is not None and (self.sharded or self.accelerator.is_main_process):
            loss = self.validation_loss(self.validation)
            if self.without_memory:
                clear_device_cache(garbage_collection=True)  # what a failed one held
            if loss is not None:
                self.accelerator.log({"validation_loss": loss}, step=self.done)
                stop += self.early_stopping is not None and self.early_stopping.should_stop(loss)
        if self.early_stopping is not None:
            stop = cast(Tensor, self.accelerator.reduce(stop, "sum"))
        self.accelerator.wait_for_everyone()
        return bool(stop.item())

    def preview(self, show: Callable[[int], None]) -> None:
        """Show what is there before the first step, as at a validation."""
        if self.sharded or self.accelerator.is_main_process:
            self.validation_loss(show)

    def validation_loss(self, validation: Callable[[int], float | None]) -> float | None:
        """Validate with the weights that would be saved; one that runs out of memory gives None.

        Raises:
            TrainingMemoryError: for lack of memory if the model is sharded: the other processes wait for its pieces.
        """
        self.wrapped.eval()
        try:
            # Samples come in other shapes than batches, so code would be compiled anew for them.
            eager = torch.compiler.set_stance("force_eager") if self.arguments.compile else nullcontext()
            with eager, averaged(self.optimizer, self.ema, self.parameters):
                return validation(self.done)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = validation_without_memory(error, self.done, self.output_dir, ends_run=self.sharded)
            if self.sharded:
                raise TrainingMemoryError(message) from error
            if type(error) not in self.without_memory:
                self.accelerator.print(message)
            self.without_memory.add(type(error))
            return None
        finally:
            self.wrapped.train()

    def save(self, finish: Callable[[Path], object] | None) -> Path:
        """Save the result and what belongs beside it, validate it, and return its folder."""
        # What is saved is what the model goes on with.
        self.optimizer.eval()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        if self.accelerator.is_main_process:
            save_model(self.accelerator.unwrap_model(self.wrapped), self.output_dir)
            if finish is not None:
                finish(self.output_dir)
        self.validate()
        self.accelerator.end_training()
        return self.output_dir
