"""What an adapter computes on one layer where an image has regions with contexts of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UserValueError
from .in_force import STATE
from .request import for_mechanism


def in_regions(layer: Any, adapter_name: str, z_nTS: Tensor, c_nTS: Tensor) -> Tensor:
    """Mix c(m) of the regions' contexts into the background's c, by their shares in each token; (n, T, S)."""
    frame = STATE.box.frame
    if frame is None or frame.places is None or frame.owner is not layer.conditioning or frame.request is None:
        return c_nTS
    context = frame.request.adapters.get(adapter_name)
    if context is None or context.regions is None:
        return c_nTS
    shares = frame.places.weights(context.regions, z_nTS, layer.name)
    if shares is None:
        return c_nTS
    causal = layer.causal(adapter_name)
    strengths = for_mechanism(context.strengths.to(z_nTS.device), causal.num_concepts, causal.observational_rank)
    # Not a difference to the background: what is whole in a region, or outside of all, is exact.
    mixed = c_nTS * (1 - shares.sum(0))
    for share, own in zip(shares, strengths[1:], strict=True):
        mixed = mixed + share * (causal(z_nTS, own[None]) * layer.scaling[adapter_name])
    return mixed


def check_denoiser(owners: Iterable[Any]) -> None:
    """Refuse (ValueError) contexts per region where only models of text have adapters."""
    if all(isinstance(owner._model and owner._model(), PreTrainedModel) for owner in owners):
        raise UserValueError(
            "Contexts per region were given, and only models of transformers have an adapter here, whose tokens are in "
            "no image. Use one context, or one per sample."
        )
