"""The paper's autoencoder, trained on images in contexts."""

from .images import ImageSet
from .train import train_autoencoder

__all__ = ["ImageSet", "train_autoencoder"]
