"""`hf-causal-context train`: fine-tune an adapter on a diffusers pipeline."""

from __future__ import annotations

from ..training.arguments import TrainingArguments as Arguments
from .finished import say_how_to_judge, say_where, told_interruption


def run(arguments: Arguments) -> None:
    """Train, and say where the adapter is, if there is one; see `train` for what it raises."""
    from ..training.finetune import train

    with told_interruption(arguments):
        folder = train(arguments)
    if not arguments.dry_run:
        say_where("adapter", folder)
        say_how_to_judge(arguments, folder)
