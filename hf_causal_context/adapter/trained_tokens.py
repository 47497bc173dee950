"""Rows of the embedding that are trained beside an adapter: a part of what it holds of the data's own look.

PEFT's `trainable_token_indices`, whose rows act whenever the adapter is on. Here they act in contexts, for each sample
at the strength of the observational part: without a context the model is the base, bit for bit. An output layer that is
tied to the embedding has them, too.

Shapes: n rows of a batch, T tokens, k trained tokens, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from ..contexts import ConceptSet
from ..errors import UserValueError
from .conditioning.hooks import Conditioning
from .conditioning.request import completed
from .merged_context import HoldsMergedContexts, strengths_to_merge
from .storage.layout import TOKENS


class ContextTokens(HoldsMergedContexts, TrainableTokensLayer):
    """The trained rows of one embedding, or of the output layer that is tied to it."""

    contexts: Conditioning  # `conditioning` is what adapted layers are known by
    name: str

    @property
    def concepts(self) -> dict[str, ConceptSet]:
        """Of each adapter of this method."""
        return self.contexts.concepts

    def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output, plus what the active adapters' rows add in the contexts that are set."""
        if self.disable_adapters and self.merged:
            self.take_out()
        if self.disable_adapters or self.merged:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        if others := [name for name in active_adapters if name not in self.concepts]:
            result = super().forward_adapters(x, others, *args, **kwargs)
        else:
            result = self.base_layer(x, *args, **kwargs)
        for name in self._own(active_adapters):
            strengths = self.contexts.strengths_for(cast(Any, self), name, x, len(x) if x.ndim > 1 else 1)
            if strengths is not None:
                part = completed(strengths, len(self.concepts[name]))[:, 0]
                result = self._add(result, x, name, part.view(-1, *(1,) * (result.ndim - 1)))
        return result

    def _add(self, result: Tensor, x: Tensor, name: str, strength: Tensor) -> Tensor:
        index = torch.tensor(self.token_indices[name], device=x.device)
        difference_kD = self.trainable_tokens_delta[name] - self.trainable_tokens_original[name]
        strength = strength.to(difference_kD.dtype)
        if isinstance(self.base_layer, nn.Embedding):
            scale = self._get_embed_scale()
            added = (x[..., None] == index).to(difference_kD.dtype) @ difference_kD
            added = strength * added * (1 if scale is None else scale.to(added.dtype))
            return result + added.to(result.dtype)
        added_nTk = strength * nn.functional.linear(x.to(difference_kD.dtype), difference_kD)
        return result.index_add(-1, index, added_nTk.to(result.dtype))

    def rows(self, name: str, strengths: Tensor) -> Tensor:
        """Return the rows (k, D) of an adapter in one context, of strengths (1, 1 + K); float32."""
        trained = self.trainable_tokens_delta[name].detach().float()
        return torch.lerp(cast(Tensor, self.trainable_tokens_original[name]).float(), trained, strengths[0, 0].item())

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        """Return the base's weight for whoever reads it: no context is known there."""
        return super().get_merged_weights([name for name in active_adapters if name not in self.concepts])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the rows into the weight, at the strength that the observational part has in the context."""
        if adapter_names is None and self.contexts.request() is None and not self.training:
            return  # as adapted layers do, which warn
        names = check_adapters_to_merge(self, adapter_names)
        if others := [name for name in names if name not in self.concepts]:
            super().merge(safe_merge, others)
        for name in self._own(names):
            self.merge_strengths(name, strengths_to_merge(self.contexts, name, self.training), safe_merge)

    def merged_weight(self, adapter_name: str, strengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.rows(adapter_name, strengths)
        weight = cast(nn.Embedding, self.base_layer).weight
        index = torch.tensor(self.token_indices[adapter_name], device=weight.device)
        return weight, weight.data.index_copy(0, index, rows.to(weight)), rows

    def conditioning_of_model(self) -> Conditioning:
        return self.contexts

    def unmerge(self) -> None:
        """Write the base's rows into the weight again."""
        for name in self.merged_strengths:
            self.contexts.merged.pop(name, None)
        self.merged_strengths, self.set_aside = {}, {}
        super().unmerge()

    def _own(self, names: Sequence[str]) -> Iterator[str]:
        return (name for name in names if name in self.concepts and name in self.trainable_tokens_delta)


def check_token_indices(model: nn.Module, indices: Sequence[int] | None) -> None:
    """Refuse rows that a model's embedding does not have.

    Raises:
        ValueError: naming the number of rows.
    """
    if indices is None:
        return
    embedding = cast(Any, model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if weight is None:
        raise UserValueError(
            f"trainable_token_indices are rows of an embedding, and {type(model).__name__} has none. Leave them out."
        )
    if max(indices) >= len(weight):
        raise UserValueError(
            f"trainable_token_indices has {max(indices)}, and the embedding of {type(model).__name__} has rows up to "
            f"{len(weight) - 1}. Resize it first (model.resize_token_embeddings), or correct the index."
        )


def put_in_contexts(model: nn.Module, adapter_name: str, conditioning: Conditioning) -> None:
    """Let the rows that PEFT has just made trainable act in contexts only."""
    for path, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper) and adapter_name in module.token_adapter.token_indices:
            tokens = cast(Any, module.token_adapter)
            if not isinstance(tokens, ContextTokens):  # PEFT's wrapper makes one of its own class
                tokens.__class__, tokens.merged_strengths, tokens.set_aside = ContextTokens, {}, {}
            tokens.contexts, tokens.name = conditioning, path
            tokens.train(tokens.base_layer.training)  # new modules are in training mode


def baked_tokens(model: nn.Module, adapter_name: str, strengths: Tensor) -> dict[str, Tensor]:
    """Return the trained rows of an adapter in one context, by their names in a file."""
    return {
        f"{path}{TOKENS}": tokens.rows(adapter_name, strengths).to(tokens.trainable_tokens_delta[adapter_name].dtype)
        for path, module in model.named_modules()
        if isinstance(module, TrainableTokensWrapper)
        and isinstance(tokens := module.token_adapter, ContextTokens)
        and tokens.tied_adapter is None
        and adapter_name in tokens.trainable_tokens_delta
    }


def token_weights(model: nn.Module, indices: Sequence[int] | None) -> dict[str, tuple[int, ...]]:
    """Return the name and shape under which a file holds the trained rows for a model, which may carry adapters."""
    if indices is None:
        return {}
    check_token_indices(model, indices)
    embedding = cast(Any, model).get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    return {f"{path}{TOKENS}": (len(indices), embedding.weight.shape[1])}
