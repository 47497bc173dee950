"""Checks weights while torch loads them into adapted layers, whoever asks for it: PEFT, a resumed training, a user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..peft_type import PREFIX
from .layout import AdapterError

# Conditioning of each base model -> the last call of load_state_dict on it, known by the list of missing keys that it
# fills, and which adapters it has brought weights for. (A layer sees no keys but its own.)
_CALLS: WeakKeyDictionary[object, tuple[list[str], set[str]]] = WeakKeyDictionary()


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
    call, brought = _CALLS.get(owner, (None, set()))
    if call is not missing_keys:
        _CALLS[owner] = missing_keys, (brought := set())
    adapters: dict[str, dict[str, torch.dtype]] = {}
    for name, parameter in layer.named_parameters():
        if name.startswith(PREFIX):
            adapters.setdefault(_adapter_of(f".{name}"), {})[prefix + name] = parameter.dtype
    for adapter, dtypes in adapters.items():
        missing = [key for key in dtypes if key not in state_dict]
        if len(missing) < len(dtypes):
            brought.add(adapter)
            missing += [key for key in missing_keys if _adapter_of(key) == adapter]  # of the layers before
        if missing and adapter in brought:
            raise AdapterError(
                f"The stored adapter {adapter!r} is not whole: it lacks {missing[0]!r}. It was trained for another "
                "base, or saved in part."
            )
        for key in dtypes.keys() & state_dict.keys():
            _check_values(key, state_dict[key], dtypes[key])


def _adapter_of(key: str) -> str:
    """Return the name in '...causal_context_down.default.weight'; '' for a weight of the base."""
    parts = key.rpartition(f".{PREFIX}")[2].split(".")
    return parts[1] if f".{PREFIX}" in key and len(parts) > 1 else ""


def _check_values(key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise AdapterError(f"The stored tensor {key!r} is of type {tensor.dtype}; weights are floating-point numbers.")
    if tensor.device.type != "meta" and not bool(torch.isfinite(tensor.to(dtype)).all()):
        raise AdapterError(
            f"The stored tensor {key!r} holds NaN or infinite values"
            + (f", or values too large for {dtype}" if tensor.dtype != dtype else "")
            + ". The file is damaged, or the training diverged: use another copy or an earlier checkpoint."
        )
