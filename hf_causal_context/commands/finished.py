"""What a training says at its end, and when it is interrupted before it saves anything."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from .._files import checkpoint_steps, sibling
from ..data.arguments import AnyDataArguments
from ..hub.contents import CardContents
from ..messages.progress import say
from ..training.arguments import AdapterArguments
from ..training.optimization_arguments import OptimizationArguments


def say_where(what: str, folder: Path) -> None:
    """Say where a training left its result; of several processes one says so."""
    if os.environ.get("RANK", "0") == "0":
        print(f"The {what} is in {folder}.")


def say_how_to_judge(arguments: AdapterArguments, folder: Path) -> None:
    """Say how to measure an adapter, on the data that it was trained on and on what was held out of it.

    Nothing is said of videos, which `evaluate` does not measure.
    """
    if os.environ.get("RANK", "0") != "0" or CardContents.load(folder).frame_rate is not None:
        return
    default = type(arguments)(pretrained_model_name_or_path="-", output_dir="-")
    of_data = {field.name for field in fields(AnyDataArguments)} - {"pretrained_model_name_or_path"}
    given = {
        field.name: getattr(arguments, field.name)
        for field in fields(arguments)
        if field.name in {*of_data, "variant", "resolution"}
        and getattr(arguments, field.name) != getattr(default, field.name)
    }
    given |= {"prompt": prompt} if (prompt := getattr(arguments, "instance_prompt", "")) else {}
    words = ["evaluate", str(folder)]
    for name, value in {**given, "output_dir": sibling(folder, "-report")}.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    say(f"Does it compose? hf-causal-context {shlex.join(words)}")


@contextmanager
def told_interruption(arguments: OptimizationArguments) -> Iterator[None]:
    """Within the body, Ctrl-C outside of the training's steps says what is left, and how to go on.

    Raises:
        KeyboardInterrupt: saying so.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):  # of a step, which has saved a checkpoint
            raise
        from ..training.loop.checkpoints import last_checkpoint

        folder = Path(arguments.output_dir)
        resumes = arguments.resume_from_checkpoint == "latest" or not checkpoint_steps(folder)
        raise KeyboardInterrupt(
            f"Interrupted between steps. {last_checkpoint(folder)} Go on by running the same command "
            f"{'again' if resumes else 'with --resume_from_checkpoint latest'}."
        ) from None
