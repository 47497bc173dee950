"""Folders `checkpoint-N`: complete or absent, never half-written.

They hold what a resumed run needs: the adapter (not its base) or the whole model, the optimizer, the schedule, the
moving average and the random states. A checkpoint is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from peft import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..._files import ARGUMENTS, CHECKPOINT_NAME, PARTIAL, WEIGHTS, checkpoint_steps, complete_files, complete_or_absent
from ...adapter.config import CausalContextConfig
from ...errors import UserError, UserValueError
from ...inference.pipelines import remove_other_parts
from ..arguments import OLDER_RUNS, AdapterArguments
from ..optimization_arguments import OptimizationArguments
from .corruption import find_corruption, read_record, write_record
from .parts import adapted_models

# What a resumed run may change: its length, how it is watched, where its files are, and the rate of learning.
_MAY_CHANGE = frozenset(
    {
        *("max_train_steps", "num_train_epochs", "learning_rate", "text_encoder_learning_rate", "max_grad_norm"),
        *("validation_contexts", "validation_steps", "num_validation_images", "validation_prompt"),
        *("num_validation_texts", "max_new_tokens"),
        *("num_inference_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("report_to", "logging_dir", "output_dir", "dataloader_num_workers", "push_to_hub", "hub_model_id"),
        *("pretrained_model_name_or_path", "base", "train_data_dir", "class_data_dir", "dataset_name"),
        *("compile", "gradient_checkpointing", "shard_base"),
    }
)


_SIZES = frozenset({"train_batch_size", "gradient_accumulation_steps"})


class CheckpointError(UserError, OSError):
    """A checkpoint could not be written, or is damaged; the others are untouched."""


def register_model_hooks(accelerator: Accelerator) -> None:
    """Make `accelerator.save_state` and `load_state` carry what `save_pretrained` writes: of an adapter, no base."""

    def save(models: list, weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            for model in models:
                _write(accelerator.unwrap_model(model), Path(folder))
        weights.clear()

    def load(models: list, folder: str) -> None:
        while models:
            model = accelerator.unwrap_model(models.pop())
            parts = adapted_models(model)
            for place, part in parts.items():
                set_peft_model_state_dict(part, load_peft_weights(str(Path(folder, place)), device="cpu"))
            if not parts:
                model.load_state_dict(load_file(Path(folder, SAFETENSORS_WEIGHTS_NAME)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _write(model: nn.Module, folder: Path) -> None:
    parts = adapted_models(model)
    for place, part in parts.items():
        # With embeddings, PEFT asks the Hub about the vocabulary.
        part.save_pretrained(str(folder / place), save_embedding_layers=False)
    if not parts:
        cast(ModelMixin, model).save_pretrained(folder)


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a model's files into a folder that holds other things too; each appears complete or not at all.

    Raises:
        CheckpointError: when they cannot be written.
    """
    parts = adapted_models(model)
    write_files(folder, WEIGHTS if parts else SAFETENSORS_WEIGHTS_NAME, lambda unfinished: _write(model, unfinished))
    if parts:
        remove_other_parts(folder, parts)


def write_files(folder: Path, name: str, save: Callable[[Path], object]) -> None:
    """Write what `save(other_folder)` writes into a folder that holds other things too.

    Each file appears complete or not at all; `name` is the most important one, for messages.

    Raises:
        CheckpointError: when they cannot be written.
    """
    with writing(folder / name, folder), complete_files(folder) as unfinished:
        save(unfinished)


def write_file(path: Path, output_dir: Path, save: Callable[[Path], object]) -> None:
    """Write a file of the run in `output_dir` by `save(path)`: complete, or not at all.

    Raises:
        CheckpointError: when it cannot be written.
    """
    with writing(path, output_dir), complete_or_absent(path) as unfinished:
        save(unfinished)


def write_text(path: Path, output_dir: Path, text: str) -> None:
    """Write a text as a file of the run; see `write_file`."""
    write_file(path, output_dir, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


@contextmanager
def writing(path: Path, output_dir: Path) -> Iterator[None]:
    """Within the body, `path` is written for the run in `output_dir`.

    Raises:
        CheckpointError: instead of what the system, torch and safetensors raise when a disk is full or broken.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"Could not write {path} ({error}). {free_space(output_dir)} {last_checkpoint(output_dir)} Make room, then "
            "resume with --resume_from_checkpoint latest."
        ) from error


def check_unused(output_dir: Path) -> None:
    """Refuse the folder of another run.

    Raises:
        FileExistsError: for checkpoints in it.
    """
    if checkpoint_steps(output_dir):
        raise FileExistsError(
            f"{output_dir} holds checkpoints of another run. Go on with it by --resume_from_checkpoint latest, "
            "remove them, or choose another --output_dir."
        )


def check_start(arguments: OptimizationArguments, num_processes: int, model: nn.Module | None = None) -> Path | None:
    """Refuse what a run cannot begin in or go on from, as far as it is known, before anything that takes long.

    Return the checkpoint that it goes on from.

    Raises:
        FileNotFoundError, FileExistsError, CheckpointError, ValueError: see `open_output_dir`.
    """
    output_dir, wanted = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if wanted is None:
        check_unused(output_dir)
    elif found := find_checkpoint(output_dir, wanted, lambda _: None):
        check_same_run(found[1], arguments, model, num_processes)
        if arguments.max_train_steps is not None:
            check_length(*found, arguments.max_train_steps)
        return found[1]
    return None


def open_output_dir(
    accelerator: Accelerator, model: nn.Module, arguments: OptimizationArguments, num_steps: int
) -> tuple[int, Path] | None:
    """Make the folder of a run of so many steps; return the step and folder of the checkpoint to go on from, if any.

    Raises:
        FileNotFoundError, FileExistsError, CheckpointError, ValueError: see `fit`.
    """
    output_dir, wanted = Path(arguments.output_dir), arguments.resume_from_checkpoint
    found = find_checkpoint(output_dir, wanted, accelerator.print) if wanted else None
    if found is not None:
        check_same_run(found[1], arguments, model, accelerator.num_processes)
        check_length(*found, num_steps)
    elif wanted:
        accelerator.print(f"There is no checkpoint in {output_dir} yet: the run starts from the beginning.")
    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        for pattern in (PARTIAL, ".checkpoint-*.unfinished", ".checkpoint-*.removed"):  # of a killed run
            for path in output_dir.glob(pattern):
                shutil.rmtree(path)
        if not wanted:
            check_unused(output_dir)
        check_space(output_dir, model, arguments)
        arguments.save(output_dir)
    return found


def find_checkpoint(output_dir: Path, wanted: str, say: Callable[[str], object]) -> tuple[int, Path] | None:
    """Return the checkpoint to resume from: "latest" (None if there is none yet), a name in `output_dir`, or a folder.

    "latest" passes over damaged ones, each of which `say` is told of.

    Raises:
        FileNotFoundError: for a checkpoint that does not exist.
        FileExistsError: for one of another folder, where `output_dir` has some of its own.
        CheckpointError: for a damaged one, or if all are.
    """
    checkpoints = checkpoint_steps(output_dir)
    if wanted == "latest":
        for step, folder in reversed(checkpoints.items()):
            if (found := find_corruption(folder)) is None:
                return step, folder
            say(f"{folder} is damaged ({found}): it is passed over.")
        if checkpoints:
            raise CheckpointError(
                f"All checkpoints in {output_dir} are damaged: {', '.join(p.name for p in checkpoints.values())}. "
                "Restore one from a copy, or remove them to start from the beginning."
            )
        return None
    path = _named(output_dir, wanted)
    match = CHECKPOINT_NAME.fullmatch(path.name)
    there = ", ".join(p.name for p in checkpoints.values()) or "none"
    if not path.is_dir() or not match:
        raise FileNotFoundError(
            f"--resume_from_checkpoint={wanted} is not a checkpoint. In {output_dir} there are: {there}. Give one of "
            "them, or latest."
        )
    if (found := find_corruption(path)) is not None:
        raise CheckpointError(
            f"--resume_from_checkpoint={wanted} is damaged ({found}). In {output_dir} there are: {there}. Give another "
            "one, or latest, which takes the newest that is whole."
        )
    if path.parent.resolve() != output_dir.resolve():
        check_unused(output_dir)  # its later checkpoints would be removed
    return int(match[1]), path


def earlier_run(arguments: OptimizationArguments) -> Path | None:
    """The folder of the run that `resume_from_checkpoint` goes on with; None where there is nothing to go on with."""
    output_dir, wanted = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if wanted is None:
        return None
    folder = output_dir if wanted == "latest" else _named(output_dir, wanted).parent
    return folder if checkpoint_steps(folder) else None


def _named(output_dir: Path, wanted: str) -> Path:
    return output_dir / wanted if (output_dir / wanted).is_dir() else Path(wanted)


def check_same_run(folder: Path, arguments: OptimizationArguments, model: nn.Module | None, num_processes: int) -> None:
    """Refuse to go on from a checkpoint with settings that would make another run of it.

    The rows of an adapter's step, and their noise, do not depend on how it is cut into batches and processes, but for
    aspect-ratio buckets. Without a model, what the arguments leave to it and to the data is not compared.

    Raises:
        ValueError: naming what differs.
    """
    stored = json.loads((folder / ARGUMENTS).read_text())
    given = dataclasses.asdict(arguments)
    # What a run did not know, because it is older, was as the default is, or as OLDER_RUNS says.
    stored = {field.name: _default(field) for field in dataclasses.fields(arguments)} | stored
    differing = {
        f"--{name}": (stored[name], given[name])
        for name in sorted(given.keys() - _MAY_CHANGE - _SIZES)
        if stored[name] != given[name] and (name != "observational_steps" or given[name] is not None)
    }
    then = _size(stored, read_record(folder).get("num_processes", num_processes))
    now = _size(given, num_processes)
    adapter = isinstance(arguments, AdapterArguments)
    # In buckets every batch of a step has a shape of its own, so their number counts, too.
    batches_too = given.get("aspect_ratio_buckets") and then[1] != now[1]
    if batches_too or (math.prod(then) != math.prod(now) if adapter else then != now):
        rows = "rows of a step, --train_batch_size x --gradient_accumulation_steps x processes"
        differing[rows] = (" x ".join(map(str, then)), " x ".join(map(str, now)))
    old, new, decided = ({}, {}, ()) if model is None else _left_open(folder, model)
    for name in decided:
        if old[name] != new[name] and f"--{name}" not in differing:
            differing[name] = (old[name], new[name])
    if differing:
        listed = "; ".join(f"{name}: {then!r} then, {now!r} now" for name, (then, now) in differing.items())
        raise UserValueError(
            f"{folder} belongs to a run with other settings ({listed}). Resume with the same ones, or "
            "start anew in another --output_dir."
        )


def check_length(step: int, folder: Path, num_steps: int) -> None:
    """Refuse to go on from a checkpoint that lies behind the end of the run.

    Raises:
        ValueError: naming it.
    """
    if step > num_steps:
        raise UserValueError(
            f"{folder} has {step} steps behind it, and the run is to have {num_steps} (--max_train_steps, or "
            "--num_train_epochs). Give more, or resume from an earlier checkpoint."
        )


def _left_open(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """What the arguments leave to the data and the base, then and now, and its names."""
    if adapted := adapted_models(model).get(""):
        then, now = vars(CausalContextConfig.from_pretrained(str(folder))), vars(adapted.peft_config["default"])
        return then, now, ("concepts", "target_modules", "observational_rank")
    return cast(Any, model).load_config(folder), dict(cast(Any, model).config), ("concepts", "base")


def _size(settings: dict[str, Any], num_processes: int) -> tuple[int, int, int]:
    return settings["train_batch_size"], settings["gradient_accumulation_steps"], num_processes


def _default(field: dataclasses.Field) -> object:
    if field.name in OLDER_RUNS:
        return OLDER_RUNS[field.name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; renamed first, so that a kill in between leaves none that is half removed."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.removed")))


def save_checkpoint(accelerator: Accelerator, arguments: OptimizationArguments, step: int, begun_steps: int) -> None:
    """Write `checkpoint-<step>` and remove the oldest ones beyond `checkpoints_total_limit`.

    Raises:
        CheckpointError: when it cannot be written, on a full disk for example.
    """
    output_dir, limit = Path(arguments.output_dir), arguments.checkpoints_total_limit
    folder = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f".{folder.name}.unfinished"  # all processes write into it

    def finish() -> None:
        if accelerator.is_main_process:
            arguments.save(unfinished)
            write_record(unfinished, accelerator.num_processes, begun_steps)
            unfinished.rename(folder)

    stages = (lambda: unfinished.mkdir(exist_ok=True), lambda: accelerator.save_state(str(unfinished)), finish)
    for write in stages:
        with writing(folder, output_dir):
            try:
                write()
            except Exception:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        accelerator.wait_for_everyone()  # waiting is no writing: another process that is gone is no error of the disk
    if accelerator.is_main_process and limit is not None:
        for old in list(checkpoint_steps(output_dir).values())[:-limit]:
            remove_checkpoint(old)


def check_writable(output_dir: Path) -> None:
    """Refuse to start where nothing could be written; creates nothing.

    Raises:
        CheckpointError: naming what is in the way.
    """
    there = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise CheckpointError(f"--output_dir={output_dir}: {there} is a file, not a folder. Choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"--output_dir={output_dir}: {there} cannot be written to. {last_checkpoint(output_dir)} Make it writable, "
            "or choose another folder."
        )


def check_space(output_dir: Path, model: nn.Module, arguments: OptimizationArguments) -> None:
    """Refuse to start on a disk that cannot hold two checkpoints.

    Raises:
        CheckpointError: with what is free and what is needed.
    """
    copies = 4 if arguments.use_ema else 3  # the weights, AdamW's two moments, the average
    frozen = 0 if adapted_models(model) else 1  # of an adapter, they are not saved
    numbers = sum(p.numel() * (copies if p.requires_grad else frozen) for p in model.parameters())
    needed = 2 * 4 * numbers / 1e6
    if shutil.disk_usage(output_dir).free < needed * 1e6:
        raise CheckpointError(
            f"{free_space(output_dir)} Two checkpoints need {needed:.1f} MB. Make room, or choose another --output_dir."
        )


def free_space(output_dir: Path) -> str:
    """Return a sentence for messages."""
    return f"{shutil.disk_usage(output_dir).free / 1e6:.1f} MB are free in {output_dir}."


def last_checkpoint(output_dir: Path) -> str:
    """Return a sentence for messages."""
    paths = list(checkpoint_steps(output_dir).values())
    return f"The last complete checkpoint is {paths[-1]}." if paths else "There is no checkpoint yet."
