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
    """What `match_layer_rows` asks: ragged, flat, stacked."""
    flat = x.ndim == 2 and (frame is None or frame.tokens > frame.num_rows)  # else samples are vectors themselves
    if frame is None:
        return False, flat, False
    # In models of transformers only: in those of diffusers there are often as many frames as samples.
    transposed = x.ndim == 3 and x.shape[0] != frame.num_rows == x.shape[1] and hasattr(frame.model, "main_input_name")
    return frame.ragged or transposed, flat, is_stacked(frame.model, layer_name)
