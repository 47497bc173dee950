"""Finds the adapted layers of a model, and the conditioning that they share."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from .conditioning.hooks import Conditioning
from .layer import CausalContextLayer


def conditionings(model: object) -> list[Conditioning]:
    """Those of the adapted models inside a module, or among the components of a diffusers pipeline."""
    components = [model] if isinstance(model, nn.Module) else getattr(model, "components", {}).values()
    found = {id(each): each for c in components if isinstance(c, nn.Module) for each in _inside(c)}
    return [each for each in found.values() if each.alive]


# Module -> the number of changes when it was looked through, and what was found. A pipeline asks in every call.
_FOUND: WeakKeyDictionary[nn.Module, tuple[int, list[Conditioning]]] = WeakKeyDictionary()


def _inside(module: nn.Module) -> list[Conditioning]:
    changes, found = _FOUND.get(module, (-1, []))
    if changes != Conditioning.changes:
        layers = (m for m in module.modules() if isinstance(m, CausalContextLayer))
        found = list({id(layer.conditioning): layer.conditioning for layer in layers}.values())
        _FOUND[module] = Conditioning.changes, found
    return found


def adapted_layers(model: nn.Module) -> dict[str, CausalContextLayer]:
    """Return the adapted layers inside a model by their paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CausalContextLayer)}
