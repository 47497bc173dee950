"""`hf-causal-context train-autoencoder`: train the paper's autoencoder on images in contexts."""

from __future__ import annotations

from ..training.autoencoder import train_autoencoder
from ..training.autoencoder.arguments import AutoencoderArguments as Arguments
from .finished import say_where


def run(arguments: Arguments) -> None:
    """Train, and say where the autoencoder is; see `train_autoencoder` for what it raises."""
    say_where("autoencoder", train_autoencoder(arguments))
