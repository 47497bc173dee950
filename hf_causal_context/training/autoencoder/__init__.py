"""The paper's autoencoder, trained on images in contexts."""

from .images import PictureSet
from .train import train_autoencoder

__all__ = ["PictureSet", "train_autoencoder"]
