"""`hf-causal-context train-autoencoder`: train the paper's autoencoder on images in contexts."""

from __future__ import annotations

from ..training.autoencoder.arguments import AutoencoderArguments as Arguments
from .finished import say_where, told_interruption


def run(arguments: Arguments) -> None:
    """Train, and say where the autoencoder is; see `train_autoencoder` for what it raises."""
    from ..training.autoencoder import train_autoencoder

    with told_interruption(arguments):
        folder = train_autoencoder(arguments)
    say_where("autoencoder", folder)
