"""`hf-causal-context train`: fine-tune an adapter on a diffusers pipeline."""

from __future__ import annotations

from ..training.arguments import TrainingArguments as Arguments
from ..training.finetune import train
from .finished import say_where


def run(arguments: Arguments) -> None:
    """Train, and say where the adapter is; see `train` for what it raises."""
    say_where("adapter", train(arguments))
