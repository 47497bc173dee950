"""The settings that a training of any model of this package has, under the argument names of diffusers' scripts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .._files import ARGUMENTS
from ..data.arguments import argument, refuse_useless
from ..errors import UserValueError
from .optimizers import OPTIMIZERS, optimizer_by_name

LR_SCHEDULERS = (
    *("constant", "constant_with_warmup", "linear", "polynomial"),
    *("cosine", "cosine_with_min_lr", "cosine_with_restarts"),
)


@dataclass
class OptimizationArguments:
    """How any model of this package is trained, checkpointed and watched.

    Raises:
        ValueError: for a number out of range, or an unknown name.
        ImportError: for an optimizer whose package is not installed.
    """

    output_dir: str = argument("", "Required. Folder for the result, its checkpoints and samples.")

    train_batch_size: int = argument(16, "Samples per step and process.")
    gradient_accumulation_steps: int = argument(1, "Batches per optimizer step.")
    max_train_steps: int | None = argument(None, "Optimizer steps; overrides num_train_epochs.")
    num_train_epochs: int = argument(100, "Passes over the data.")
    learning_rate: float = argument(1e-4, "Peak learning rate.")
    lr_scheduler: str = argument("constant", "One of: " + ", ".join(LR_SCHEDULERS) + ".")
    lr_warmup_steps: int = argument(0, "Optimizer steps of warm-up.")
    optimizer: str = argument("adamw", "One of: " + ", ".join(OPTIMIZERS) + ".")
    optimizer_args: list[str] = argument(
        [], "Further settings of another optimizer than adamw, such as weight_decay=0.01 'betas=(0.9, 0.99)'."
    )
    adam_beta1: float = argument(0.9, "adamw and adamw8bit.")
    adam_beta2: float = argument(0.999, "adamw and adamw8bit.")
    adam_weight_decay: float = argument(1e-2, "adamw and adamw8bit.")
    adam_epsilon: float = argument(1e-8, "adamw and adamw8bit.")
    max_grad_norm: float = argument(1.0, "Gradients are clipped to this norm.")
    use_ema: bool = argument(False, "Average the trained weights over steps; the average is what is saved.")
    ema_decay: float = argument(0.999, "Largest decay of that average.")
    mixed_precision: str | None = argument(None, "no, fp16 or bf16; by default what accelerate was told.")
    compile: bool = argument(False, "Compile the model with torch.compile; pays off on a GPU.")
    seed: int = argument(0, "Of the initial weights, the order of the data and the noise.")

    validation_steps: int | None = argument(None, "Optimizer steps between validations; by default only at the end.")
    validation_contexts: list[str] | None = argument(
        None, "Contexts of the samples; by default obs, every single concept, held-out contexts (or some pairs)."
    )
    checkpointing_steps: int = argument(500, "Optimizer steps between checkpoints.")
    checkpoints_total_limit: int | None = argument(None, "How many checkpoints are kept.")
    resume_from_checkpoint: str | None = argument(None, "A checkpoint's folder, or latest.")
    report_to: str | None = argument(None, "Tracker: tensorboard, wandb, trackio ...")
    logging_dir: str = argument("logs", "Folder of the tracker inside output_dir.")

    def __post_init__(self) -> None:
        for name, minimum in self._minima().items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise UserValueError(f"--{name}={value} must be at least {minimum}.")
        for name, most in (("learning_rate", torch.finfo(torch.float32).max), ("max_grad_norm", math.inf)):
            if not 0 < getattr(self, name) <= most:
                raise UserValueError(f"--{name}={getattr(self, name)} must be positive, and at most {most:g}.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserValueError(f"--{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not self.output_dir:
            raise UserValueError("Missing: --output_dir. Give the folder for the results.")
        for name, allowed in self._choices().items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise UserValueError(f"--{name}={getattr(self, name)} is unknown. Allowed: {listed}.")

        if self.optimizer == "adamw" and self.optimizer_args:
            raise UserValueError(
                f"--optimizer_args={self.optimizer_args} with --optimizer=adamw: its settings are --adam_beta1, "
                "--adam_beta2, --adam_weight_decay and --adam_epsilon."
            )
        if self.optimizer == "prodigy" and self.learning_rate < 0.01:
            raise UserValueError(
                f"--optimizer=prodigy finds the learning rate, and multiplies it by --learning_rate="
                f"{self.learning_rate}: nothing would be learned. Give --learning_rate 1."
            )
        if self.optimizer == "schedulefree" and (self.use_ema or not self.lr_scheduler.startswith("constant")):
            raise UserValueError(
                "--optimizer=schedulefree averages the weights itself, in place of a schedule. Leave --use_ema out, "
                f"and --lr_scheduler={self.lr_scheduler} too."
            )
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            refuse_useless(
                self, ["lr_warmup_steps"], "Only --lr_scheduler=constant_with_warmup warms a constant rate up"
            )
        if not self.optimizer.startswith("adamw"):
            own = f"--optimizer={self.optimizer} has its settings in --optimizer_args"
            refuse_useless(self, ["adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"], own)
        if not self.use_ema:
            refuse_useless(self, ["ema_decay"], "--use_ema was not given")
        if self.report_to is None:
            refuse_useless(self, ["logging_dir"], "--report_to was not given")
        optimizer_by_name(self.optimizer, [torch.zeros(1)], self.optimizer_args)  # refused before anything is loaded

    def _choices(self) -> dict[str, tuple[str | None, ...]]:
        return {
            "lr_scheduler": LR_SCHEDULERS,
            "optimizer": (*OPTIMIZERS,),
            "mixed_precision": (None, "no", "fp16", "bf16"),
        }

    def _minima(self) -> dict[str, float]:
        return {
            "train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_train_steps": 1,
            "num_train_epochs": 1,
            "lr_warmup_steps": 0,
            "adam_weight_decay": 0,
            "adam_epsilon": 0,
            "seed": 0,
            "validation_steps": 1,
            "checkpointing_steps": 1,
            "checkpoints_total_limit": 1,
        }

    def steps_per_epoch(self, rows: int, num_processes: int = 1) -> int:
        """Optimizer steps in which as many samples are drawn as there are rows."""
        samples = self.train_batch_size * self.gradient_accumulation_steps * num_processes
        return max(1, math.ceil(rows / samples))

    def save(self, folder: Path) -> None:
        """Write training_arguments.json: as `--config` of the command it repeats the run, wherever that was resumed."""
        settings = dataclasses.asdict(self) | {"resume_from_checkpoint": None}
        (folder / ARGUMENTS).write_text(json.dumps(settings, indent=2) + "\n")
