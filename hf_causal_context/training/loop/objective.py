"""What a training minimizes."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """A loss for the training loop."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Losses (B,), one per sample; further ones may follow, which belong to none."""
        ...
