"""`hf-causal-context quickstart`: train, compose and score an adapter on handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data.arguments import argument


@dataclass(kw_only=True)
class Arguments:
    """Settings of the command."""

    output_dir: Path = argument(Path("digits-context"), "Folder for the adapter and its samples.")
    seed: int = argument(0, "Of the data and the training.")
    fast: bool = argument(False, "A third of the work, for a first impression: the pairs come out worse.")


def run(arguments: Arguments) -> None:
    """Run it; see `quickstart` for what it raises."""
    from ..quickstart import choose_threads, quickstart

    try:
        choose_threads()
        quickstart(arguments.output_dir, arguments.seed, fast=arguments.fast)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or "Interrupted. Go on by running the same command again.") from None
