"""A base without its adapter."""

from __future__ import annotations

from typing import Any

from torch import nn


class BareModel:
    """Calls a model without a context: then it is its base, bit for bit, whether or not it carries an adapter."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, *args: Any, context: object = None, **kwargs: Any) -> Any:
        """Return what the base returns."""
        return self._model(*args, **kwargs)
