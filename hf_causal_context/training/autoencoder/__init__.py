"""The paper's autoencoder, trained on images in contexts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .images import ImageSet
    from .train import train_autoencoder

__all__ = ["ImageSet", "train_autoencoder"]


def __getattr__(name: str) -> Any:
    # The command's options are in this package, too, and are read before what takes long is imported.
    if name in __all__:
        return getattr(import_module(".images" if name == "ImageSet" else ".train", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
