"""`hf-causal-context train`: fine-tune an adapter on a diffusers pipeline."""

from __future__ import annotations

from ..training.arguments import TrainingArguments as Arguments
from ..training.finetune import train
from .finished import say_where


def run(arguments: Arguments) -> None:
    """Train, and say where the adapter is, if there is one; see `train` for what it raises."""
    folder = train(arguments)
    if not arguments.dry_run:
        say_where("adapter", folder)
