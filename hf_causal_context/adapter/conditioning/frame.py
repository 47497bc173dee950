"""What one forward of a base model knows about its contexts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .regions import Places
from .request import Owner, Request
from .rows import is_stacked


@dataclass
class Frame:
    """What the layers read during one forward of a base model."""

    owner: Owner
    model: nn.Module
    outer: Frame | None
    request: Request | None = None
    num_rows: int = 0
    ragged: bool = False  # rows inside the model need not be whole multiples per sample
    tokens: int = 0  # of all rows, about
    device: torch.device | None = None
    places: Places | None = None  # of tokens in the image, where regions have contexts of their own
    strengths: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of each adapter: see `causal_matrices`
    repeated: dict[tuple, Tensor] = field(default_factory=dict)  # strengths per feature, for layers alike


def rows_in_doubt(frame: Frame | None, layer_name: str, x: Tensor) -> tuple[bool, bool, bool]:
    """Whether samples are ragged, a layer's input may hold tokens where it could hold samples, copies are stacked."""
    flat = x.ndim == 2 and (frame is None or frame.tokens > frame.num_rows)  # else samples are vectors themselves
    if frame is None:
        return False, flat, False
    return frame.ragged, flat, is_stacked(frame.model, layer_name)
