"""Folders `checkpoint-N`: complete or absent, never half-written.

They hold what a resumed run needs, and not the base model: the adapter, the optimiser, the schedule, the moving average
and the random states. A checkpoint is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from ..adapter.config import CausalContextConfig
from .arguments import ARGUMENTS, TrainingArguments

_NAME = re.compile(r"checkpoint-(\d+)")
# What a resumed run may change: its length, how it is watched, where its files are, and the rate of learning.
_MAY_CHANGE = frozenset(
    {
        *("max_train_steps", "num_train_epochs", "learning_rate", "max_grad_norm"),
        *("validation_contexts", "validation_steps", "num_validation_images", "validation_prompt"),
        *("num_inference_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("report_to", "logging_dir", "output_dir", "dataloader_num_workers"),
        *("pretrained_model_name_or_path", "train_data_dir", "dataset_name"),
    }
)


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


def register_adapter_hooks(accelerator: Accelerator) -> None:
    """Make `accelerator.save_state` and `load_state` carry the adapter instead of the whole model."""

    def save(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            for model in models:
                # Else PEFT asks the Hub whether the base's vocabulary changed.
                _adapter(accelerator, model).save_pretrained(folder, save_embedding_layers=False)
        weights.clear()

    def load(models: list, folder: str) -> None:
        while models:
            set_peft_model_state_dict(_adapter(accelerator, models.pop()), load_peft_weights(folder, device="cpu"))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _adapter(accelerator: Accelerator, model: object) -> PeftModel:
    adapter = accelerator.unwrap_model(model)
    assert isinstance(adapter, PeftModel)
    return adapter


def checkpoint_steps(output_dir: Path) -> dict[int, Path]:
    """Optimiser step -> folder of every complete checkpoint, oldest first."""
    found = {int(match[1]): path for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def find_checkpoint(output_dir: Path, wanted: str) -> tuple[int, Path] | None:
    """The checkpoint to resume from: "latest" (None if there is none yet), a name in `output_dir`, or a folder.

    Raises:
        FileNotFoundError: for a checkpoint that does not exist.
    """
    checkpoints = checkpoint_steps(output_dir)
    if wanted == "latest":
        return next(reversed(checkpoints.items()), None)
    path = output_dir / wanted if (output_dir / wanted).is_dir() else Path(wanted)
    match = _NAME.fullmatch(path.name)
    if not path.is_dir() or not match:
        there = ", ".join(p.name for p in checkpoints.values()) or "none"
        raise FileNotFoundError(
            f"--resume_from_checkpoint={wanted} is not a checkpoint. In {output_dir} there are: {there}. Give one of "
            "them, or latest."
        )
    return int(match[1]), path


def check_same_run(folder: Path, arguments: TrainingArguments, model: PeftModel) -> None:
    """Refuse to go on from a checkpoint with settings that would make another run of it.

    Raises:
        ValueError: naming what differs.
    """
    stored = json.loads((folder / ARGUMENTS).read_text())
    given = dataclasses.asdict(arguments)
    # What a run did not know, because it is older, was as the default is.
    stored = dataclasses.asdict(TrainingArguments(pretrained_model_name_or_path="any", output_dir="any")) | stored
    differing = {
        f"--{name}": (stored[name], given[name])
        for name in sorted(given.keys() - _MAY_CHANGE)
        if stored[name] != given[name]
    }
    # What the arguments leave to the data and the base.
    old = CausalContextConfig.from_pretrained(str(folder))
    new = model.peft_config["default"]
    for name in ("concepts", "target_modules"):
        then, now = getattr(old, name), getattr(new, name)
        if then != now and f"--{name}" not in differing:
            differing[name] = (then, now)
    if differing:
        listed = "; ".join(f"{name}: {then!r} then, {now!r} now" for name, (then, now) in differing.items())
        raise ValueError(
            f"{folder} belongs to a run with other settings ({listed}). Resume with the same ones, or "
            "start anew in another --output_dir."
        )


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; renamed first, so that a kill in between leaves none that is half removed."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.removed")))


def save_checkpoint(accelerator: Accelerator, arguments: TrainingArguments, step: int) -> Path:
    """Write `checkpoint-<step>` and remove the oldest ones beyond `checkpoints_total_limit`.

    Raises:
        CheckpointError: when it cannot be written, on a full disk for example.
    """
    output_dir, limit = Path(arguments.output_dir), arguments.checkpoints_total_limit
    folder = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f".{folder.name}.unfinished"
    try:
        unfinished.mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            arguments.save(unfinished)
            unfinished.rename(folder)
    except Exception as error:  # torch and safetensors each have an error of their own for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise not_written(folder, output_dir, error) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and limit is not None:
        for old in list(checkpoint_steps(output_dir).values())[:-limit]:
            remove_checkpoint(old)
    return folder


def not_written(path: Path, output_dir: Path, error: Exception) -> CheckpointError:
    """What to raise when `path` could not be written."""
    return CheckpointError(
        f"Could not write {path} ({error}). {free_space(output_dir)} {last_checkpoint(output_dir)} Make room, then "
        "resume with --resume_from_checkpoint latest."
    )


def write_file(path: Path, output_dir: Path, save: Callable[[Path], object]) -> None:
    """Write a file of the run in `output_dir` by `save(path)`: complete, or not at all.

    Raises:
        CheckpointError: when it cannot be written.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        save(unfinished)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise not_written(path, output_dir, error) from error
    unfinished.replace(path)


def clean_up(output_dir: Path) -> None:
    """Remove what a killed run left unfinished."""
    for pattern in (".checkpoint-*.unfinished", ".checkpoint-*.removed", ".adapter-*"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)


def check_space(output_dir: Path, needed: int) -> None:
    """Refuse to start on a disk that cannot hold two checkpoints of `needed` bytes.

    Raises:
        CheckpointError: with what is free and what is needed.
    """
    if shutil.disk_usage(output_dir).free < 2 * needed:
        raise CheckpointError(
            f"{free_space(output_dir)} Two checkpoints need {2 * needed / 1e6:.1f} MB. Make room, or choose another "
            "--output_dir."
        )


def free_space(output_dir: Path) -> str:
    """A sentence for messages."""
    return f"{shutil.disk_usage(output_dir).free / 1e6:.1f} MB are free in {output_dir}."


def last_checkpoint(output_dir: Path) -> str:
    """A sentence for messages."""
    paths = list(checkpoint_steps(output_dir).values())
    return f"The last complete checkpoint is {paths[-1]}." if paths else "There is no checkpoint yet."
