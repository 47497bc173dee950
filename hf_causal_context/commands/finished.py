"""What a training says at its end, and when it is interrupted before it saves anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._files import checkpoint_steps
from ..training.arguments import OptimizationArguments


def say_where(what: str, folder: Path) -> None:
    """Say where a training left its result; of several processes one says so."""
    if os.environ.get("RANK", "0") == "0":
        print(f"The {what} is in {folder}.")


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
