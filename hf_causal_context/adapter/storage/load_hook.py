"""Checks weights while torch loads them into adapted layers, whoever asks for it: PEFT, a resumed training, a user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..peft_type import PREFIX
from .layout import AdapterError


@dataclass
class _Call:
    """A call of `load_state_dict` on a model, of which a layer sees no keys but its own."""

    missing_keys: list[str]  # which it fills: by this list it is known
    brought: set[str] = field(default_factory=set)  # adapters that it has weights for
    lacking: dict[str, str] = field(default_factory=dict)  # adapter -> the first weight that it has not


# Conditioning of each base model -> the last call on it.
_CALLS: WeakKeyDictionary[object, _Call] = WeakKeyDictionary()


def check_loaded(
    layer: nn.Module,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    *_: object,
) -> None:
    """A pre-hook of `load_state_dict` on an adapted layer: an adapter comes whole or not at all, and finite.

    PEFT alone would load what it finds, and warn at most.

    Raises:
        AdapterError: for weights that are missing, not finite, or not of a floating-point type.
    """
    owner = cast(Any, layer).conditioning
    call = _CALLS.get(owner)
    if call is None or call.missing_keys is not missing_keys:
        call = _CALLS[owner] = _Call(missing_keys)
    adapters: dict[str, dict[str, torch.dtype]] = {}
    for part in cast(Any, layer).adapter_layer_names:
        for name, parameter in getattr(layer, part).named_parameters():
            adapters.setdefault(name.partition(".")[0], {})[f"{prefix}{part}.{name}"] = parameter.dtype
    for adapter, dtypes in adapters.items():
        for key, dtype in dtypes.items():
            if key in state_dict:
                call.brought.add(adapter)
                _check_values(key, state_dict[key], dtype)
            else:
                call.lacking.setdefault(adapter, key)
        if adapter in call.brought and adapter in call.lacking:
            raise AdapterError(
                f"The stored adapter {adapter!r} is not whole: it lacks {call.lacking[adapter]!r}. It was trained for "
                "another base, or saved in part."
            )


def check_all_have_a_place(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """A pre-hook of `load_state_dict` on a model with adapters: PEFT would leave out what the base has no module for.

    Raises:
        AdapterError: for weights of an adapted module that the model lacks.
    """
    adapted = {f"{prefix}{path}" for path, module in model.named_modules() if hasattr(module, f"{PREFIX}down")}
    for key in state_dict:
        path, *of_adapter = key.split(f".{PREFIX}", 1)
        if of_adapter and path not in adapted:
            raise AdapterError(
                f"The stored adapter has {key!r}, and the model has no adapted module of that name. It was trained for "
                "another base."
            )


def _check_values(key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise AdapterError(f"The stored tensor {key!r} is of type {tensor.dtype}; weights are floating-point numbers.")
    if tensor.device.type != "meta" and not bool(torch.isfinite(tensor.to(dtype)).all()):
        raise AdapterError(
            f"The stored tensor {key!r} holds NaN or infinite values"
            + (f", or values too large for {dtype}" if tensor.dtype != dtype else "")
            + ". The file is damaged, or the training diverged: use another copy or an earlier checkpoint."
        )
