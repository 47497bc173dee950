"""The causal matrices of all layers of an adapter, made in one batch when a forward pass begins."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from ...layers import CausalLayer
from .request import for_mechanism

# Beyond it layers make their own when they run, so that memory holds those of one layer only.
_MOST_NUMBERS = 2**25


class MixingLayer(Protocol):
    """What is asked of an adapted layer."""

    name: str  # path in the base model

    def causal(self, adapter_name: str) -> CausalLayer: ...


def causal_matrices(
    layers: Iterable[MixingLayer], adapter_name: str, strengths: Tensor, tokens: float = math.inf
) -> dict[str, Tensor]:
    """Name of a layer -> M(m)^T of an adapter, (N, S, S), for strengths (N, 1 + K).

    Without the layer's scale, which models of diffusers set inside their forward (`scale` of attention arguments).

    Left out are layers whose mechanism needs no matrix, and those whose weights are elsewhere or in pieces now, as of
    a model that is offloaded or sharded. Left out as well are those whose own steps are less work than matrices for
    about so many `tokens`, of all rows that they serve: on a CPU, where launches cost nothing.
    """
    device = strengths.device
    groups: defaultdict[object, list[MixingLayer]] = defaultdict(list)
    for layer in layers:
        weight = getattr(layer.causal(adapter_name), "shift", None)
        if type(weight) is nn.Parameter and weight.ndim == 3 and weight.device == device:  # FSDP1's pieces are flat
            groups[*layer.causal(adapter_name).kind, weight.dtype].append(layer)
    found = {}
    dtype = autocast_dtype(device)
    for alike in groups.values():
        causals = [layer.causal(adapter_name) for layer in alike]
        first = causals[0]
        features = first.observational_rank + first.num_concepts * first.width
        # Not under autocast, which would round every step of theirs.
        few_tokens = device.type == "cpu" and dtype is None and tokens < features * len(strengths)
        if few_tokens or len(alike) * len(strengths) * features**2 > _MOST_NUMBERS:
            continue
        # In full precision: these are few numbers, and every feature passes through them.
        with torch.autocast(device.type, enabled=False) if dtype else nullcontext():
            mask = for_mechanism(strengths, first.num_concepts, first.observational_rank)
            matrices = type(first).matrices(causals, mask)
        matrices = matrices if dtype is None else matrices.to(dtype)
        found |= dict(zip((layer.name for layer in alike), matrices.unbind(0), strict=True))
    return found


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in now; None where there is none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
