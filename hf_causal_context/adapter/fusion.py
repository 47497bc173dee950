"""Attention of diffusers whose projections are fused: the model then no longer calls the single ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UserValueError
from .lookup import adapted_layers
from .wrapped_methods import WrappedMethod

# Projection -> the fused ones that take its place.
_FUSED_INTO = {
    "to_q": ("to_qkv",),
    "to_k": ("to_qkv", "to_kv"),
    "to_v": ("to_qkv", "to_kv"),
    "add_q_proj": ("to_added_qkv",),
    "add_k_proj": ("to_added_qkv", "to_added_kv"),
    "add_v_proj": ("to_added_qkv", "to_added_kv"),
}


def is_fused(model: nn.Module, path: str) -> bool:
    """Whether a module is a projection that a fused one stands in for."""
    parent, _, name = path.rpartition(".")
    attention = model.get_submodule(parent)
    if not any(hasattr(attention, fused) for fused in _FUSED_INTO.get(name, ())):
        return False
    if "Attention" in (cls.__name__ for cls in type(attention).__mro__):  # diffusers' older class: its flag stays
        return "Fused" in type(getattr(attention, "processor", None)).__name__
    return bool(getattr(attention, "fused_projections", False))


class KeepsProjections(WrappedMethod):
    """`fuse_qkv_projections` of a model with adapters, which pipelines call, too."""

    name = "fuse_qkv_projections"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        adapted = [
            path
            for path, layer in adapted_layers(self.model).items()
            if layer.concepts and path.rpartition(".")[2] in _FUSED_INTO  # delete_adapters leaves layers without any
        ]
        if adapted:
            raise UserValueError(
                f"fuse_qkv_projections(): {len(adapted)} of the projections carry an adapter, such as {adapted[0]!r}. "
                "Fused, they are no longer called, and the adapter would act in part only. Leave them apart, or first "
                "merge a context for good: `with intervene(model, context): model.merge_and_unload()`."
            )
        return self.original(*args, **kwargs)
