"""The parts of a layer's adapters, under the names by which diffusers' `set_lora_device` moves those of LoRAs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class PartsByAdapter:
    """Name of an adapter -> its parts on one layer.

    No dictionary, for it holds no adapters: PEFT's tests look for what is left in those of a deleted one.
    """

    def __init__(self, kinds: Sequence[nn.ModuleDict]) -> None:
        self._kinds = kinds

    def __contains__(self, adapter_name: str) -> bool:
        return any(adapter_name in parts for parts in self._kinds)

    def __getitem__(self, adapter_name: str) -> nn.ModuleList:
        if adapter_name not in self:
            raise KeyError(adapter_name)
        return nn.ModuleList(parts[adapter_name] for parts in self._kinds if adapter_name in parts)
