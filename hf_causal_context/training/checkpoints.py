"""Folders `checkpoint-N`: complete or absent, never half-written.

They hold what a resumed run needs, and not the base model: the adapter, the optimiser, the schedule, the moving average
and the random states. A checkpoint is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

_NAME = re.compile(r"checkpoint-(\d+)")


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


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, limit: int | None) -> Path:
    """Write `checkpoint-<step>` and remove the oldest ones beyond `limit`.

    Raises:
        CheckpointError: when it cannot be written, on a full disk for example.
    """
    folder = output_dir / f"checkpoint-{step}"
    if folder.exists():
        return folder
    unfinished = output_dir / f".{folder.name}.unfinished"
    try:
        unfinished.mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            unfinished.rename(folder)
    except Exception as error:  # torch and safetensors each have an error of their own for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise not_written(folder, output_dir, error) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and limit is not None:
        for old in list(checkpoint_steps(output_dir).values())[:-limit]:
            # Renamed first, so that a kill in between leaves no checkpoint that is half removed.
            shutil.rmtree(old.rename(output_dir / f".{old.name}.removed"))
    return folder


def not_written(path: Path, output_dir: Path, error: Exception) -> CheckpointError:
    """What to raise when `path` could not be written."""
    return CheckpointError(
        f"Could not write {path} ({error}). {free_space(output_dir)} {last_checkpoint(output_dir)} Make room, then "
        "resume with --resume_from_checkpoint latest."
    )


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
