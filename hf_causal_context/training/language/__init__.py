"""Adapters of language models, trained on interventional texts."""

from .fine_tune import train_text

__all__ = ["train_text"]
