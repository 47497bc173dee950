"""`hf-causal-context train-text`: fine-tune an adapter on a language model of transformers."""

from __future__ import annotations

from ..training.arguments import TextArguments as Arguments
from ..training.language import train_text
from .finished import say_where


def run(arguments: Arguments) -> None:
    """Train, and say where the adapter is, if there is one; see `train_text` for what it raises."""
    folder = train_text(arguments)
    if not arguments.dry_run:
        say_where("adapter", folder)
