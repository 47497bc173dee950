"""Contexts of a stored adapter as LoRA, from its files alone: for tools that load the base in a way of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from ..adapter.baking import context_strengths
from ..adapter.config import CausalContextConfig
from ..adapter.layer import CausalContextLayer, adapted_class
from ..adapter.peft_type import PREFIX
from ..adapter.storage.files import read_header, read_weights
from ..contexts import Context
from ..errors import UserValueError
from .adapted import StoredAdapter

# Component ("" for the denoiser, whose adapter lies at the top) -> module of diffusers -> lora_A (S, in, *kernel) and
# lora_B (out, S), with the scale in B.
Loras: TypeAlias = dict[str, dict[str, tuple[Tensor, Tensor]]]

_NAME = "default"
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def loras_without_base(adapter: StoredAdapter, contexts: Sequence[Context]) -> list[Loras]:
    """Return the LoRA of each context, in float32, as `bake` does with the base at hand.

    Raises:
        AdapterError: for files that are damaged.
        ValueError: for unknown concepts, a mechanism that is not linear, or an adapter with whole modules.
    """
    parts = {component: _layers(*part) for component, part in adapter.parts().items()}
    return [
        {
            component: {path: layer.lora_weights(_NAME, strengths) for path, layer in layers.items()}
            for component, layers in parts.items()
        }
        for strengths in context_strengths(adapter.config, contexts).split(1)
    ]


def _layers(folder: Path, config: CausalContextConfig, source: str) -> dict[str, CausalContextLayer]:
    """Return an adapter's layers by the paths of the modules that they are for."""
    if config.modules_to_save or config.trainable_token_indices:
        raise UserValueError(
            f"{source} holds whole modules or tokens (modules_to_save, trainable_token_indices), which are no LoRA."
        )
    read_header(folder, config.layout(), source)
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_weights(folder, source).items():
        path, _, rest = key.rpartition(f".{PREFIX}")
        part, _, name = rest.partition(".")
        weights.setdefault(path, {})[f"{PREFIX}{part}.{_NAME}.{name}"] = tensor
    layers = {}
    for path, tensors in weights.items():
        down, up = (tensors[f"{PREFIX}{part}.{_NAME}.weight"] for part in ("down", "up"))
        base = _blank(down, up)
        layer = cast(type[CausalContextLayer], adapted_class(base))(base, None)
        layer.update_layer(_NAME, config, path)
        cast(nn.Module, layer).load_state_dict(tensors, strict=False)  # those of the base are not here
        layers[path] = layer
    return layers


def _blank(down: Tensor, up: Tensor) -> nn.Module:
    """Return a module of the base's size that takes no memory."""
    sizes = down.shape[1], up.shape[0]
    if down.ndim == 2:
        module = nn.Linear(*sizes, bias=False, device="meta")
    else:
        module = _CONVOLUTIONS[down.ndim](*sizes, tuple(down.shape[2:]), bias=False, device="meta")
    # On the CPU, where the adapter's layer shall be, too.
    module.weight = nn.Parameter(torch.zeros(()).expand(module.weight.shape), requires_grad=False)
    return module
