"""PEFT's `convert_to_lora` and `save_as_lora` give the LoRA of the active context.

PEFT converts a layer by a singular value decomposition of the change of its weight. Ours is the product of two thin
matrices, so where the rank allows, these are the LoRA: nothing is rounded in between.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora import conversion
from torch import Tensor

from ..errors import UserValueError
from ..messages.wording import quoted
from .merged_context import strengths_to_merge

_CONVERT = "_convert_module_to_lora"


class ConvertsToLora:
    """What PEFT asks of a layer that becomes a LoRA; a part of `CausalContextLayer`."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter on this layer can become a LoRA; if not, a warning says why."""
        layer: Any = self
        refusal = layer.merge_refusal(adapter_name)
        if refusal is None and layer._kernel_size:
            refusal = "PEFT converts no convolutions; save_baked(model, context, folder) bakes them"
        if refusal is not None:
            warnings.warn(f"Adapter {adapter_name!r} cannot be converted to LoRA: {refusal}.", stacklevel=2)
        return refusal is None

    def weights(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return the weights of Down and Up.

        Raises:
            ValueError: while they are elsewhere.
        """
        layer: Any = self
        down, up = (parts[adapter_name].weight for parts in (layer.causal_context_down, layer.causal_context_up))
        if down.is_meta or up.is_meta:
            raise UserValueError(
                f"The weights of adapter {adapter_name!r} on {layer.name!r} are offloaded now, so they cannot be read. "
                "Do this before the offloading is enabled, or take it off first (of a pipeline, remove_all_hooks())."
            )
        return down, up

    def active_strengths(self, adapter_name: str) -> Tensor:
        """Return the strengths (1, 1 + K) of the context that is set.

        Raises:
            ValueError: for an unknown adapter, or without a context for it, or with several.
        """
        self._check_context(adapter_name)
        layer: Any = self
        return strengths_to_merge(layer.conditioning, adapter_name, layer.training)

    def _check_context(self, adapter_name: str) -> None:
        layer: Any = self
        known = layer.conditioning.concepts
        if adapter_name not in known:
            raise UserValueError(f"The model has no causal context adapter {adapter_name!r}. It has: {quoted(known)}.")
        request = layer.conditioning.request()
        if request is None or request.find(adapter_name, known[adapter_name]) is None:
            raise UserValueError(
                f"No context is set for adapter {adapter_name!r}, and without one it changes nothing, so there is no "
                "LoRA of it. Convert it inside `with intervene(model, context):`; the empty context, (), is the "
                "observational one."
            )

    def active_lora(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """lora_A (r, in) and lora_B (out, r) of the context that is set, without rows that do nothing; float32.

        Both are empty where the adapter does not adapt this layer.

        Raises:
            ValueError: as `active_strengths`.
        """
        layer: Any = self
        self._check_context(adapter_name)
        if adapter_name not in layer.causal_context_down:
            return torch.zeros(0, 0), torch.zeros(0, 0)
        return without_idle_rows(*layer.lora_weights(adapter_name, self.active_strengths(adapter_name)))


def without_idle_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Without the rows of lora_A that are zero, such as those of concepts that are not intervened on; one is kept."""
    used = a.flatten(1).any(1)
    used[0] |= not used.any()
    return a[used], b[:, used]


def install() -> None:
    """Let PEFT ask our layers first. Where it has no such function, it decomposes what `get_delta_weight` returns."""
    convert: Any = getattr(conversion, _CONVERT, None)
    if convert is None or hasattr(convert, "of_peft"):
        return

    def ask_layer(module: Any, rank: float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
        if isinstance(module, ConvertsToLora):
            a, b = module.active_lora(adapter_name)
            if not len(a) or (isinstance(rank, int) and rank >= len(a)):
                return a, b, len(a)
        return convert(module, rank, adapter_name)

    ask_layer.of_peft = convert  # pyright: ignore[reportFunctionMemberAccess]
    setattr(conversion, _CONVERT, ask_layer)
