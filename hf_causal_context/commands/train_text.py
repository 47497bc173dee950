"""`hf-causal-context train-text`: fine-tune an adapter on a language model of transformers."""

from __future__ import annotations

from ..training.arguments import TextArguments as Arguments
from .finished import say_how_to_judge, say_where, told_interruption


def run(arguments: Arguments) -> None:
    """Train, and say where the adapter is, if there is one; see `train_text` for what it raises."""
    from ..training.language import train_text

    with told_interruption(arguments):
        folder = train_text(arguments)
    if not arguments.dry_run:
        say_where("adapter", folder)
        say_how_to_judge(arguments, folder)
