"""Finds the adapted layers of a model, and the conditioning that they share."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from .conditioning.hooks import Conditioning
from .layer import CausalContextLayer

# Module -> the number of changes when it was looked through, and what was found.
_FOUND: WeakKeyDictionary[nn.Module, tuple[int, list[Conditioning]]] = WeakKeyDictionary()


def conditionings(model: object) -> list[Conditioning]:
    """Return those of the adapted models inside a module, or among the components of a diffusers pipeline."""
    parts = _components(model)
    for part in parts:
        _look_through(part)
    return _found_in(parts)


def known_conditionings(model: object) -> list[Conditioning]:
    """Return the same without a look at all modules, unless hooks came or went since the last look."""
    parts = _components(model)
    for part in parts:
        if _FOUND.get(part, (-1,))[0] != Conditioning.changes:
            _look_through(part)
    return _found_in(parts)


def _look_through(part: nn.Module) -> None:
    layers = (module for module in part.modules() if isinstance(module, CausalContextLayer))
    found = list({id(layer.conditioning): layer.conditioning for layer in layers}.values())
    _FOUND[part] = Conditioning.changes, found


def _found_in(parts: list[nn.Module]) -> list[Conditioning]:
    found = {id(each): each for part in parts for each in _FOUND[part][1]}
    return [each for each in found.values() if each.alive]


def _components(model: object) -> list[nn.Module]:
    parts = [model] if isinstance(model, nn.Module) else getattr(model, "components", {}).values()
    return [part for part in parts if isinstance(part, nn.Module)]


def place(path: str) -> str:
    """Return the path of a module without the adapters of others around it, which wrap ours."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def adapted_layers(model: nn.Module) -> dict[str, CausalContextLayer]:
    """Return the adapted layers inside a model by their paths, without other adapters around them."""
    return {place(path): module for path, module in model.named_modules() if isinstance(module, CausalContextLayer)}
