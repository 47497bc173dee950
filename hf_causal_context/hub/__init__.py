"""Adapters to the Hub and back: `save` makes the folder that others see, `push` uploads it, `load` brings one back."""

from .folder import save
from .loading import load
from .repository import push

__all__ = ["load", "push", "save"]
