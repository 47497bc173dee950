"""The one context that a merge writes into a weight, and that stays there until it is unmerged."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..contexts import Context
from ..errors import UserValueError
from .conditioning.hooks import Conditioning
from .conditioning.request import completed


def strengths_to_merge(conditioning: Conditioning, adapter_name: str, training: bool) -> Tensor:
    """Return the strengths (1, 1 + K) of the context that is set; without one at inference, the observational one's.

    Raises:
        ValueError: without a context in training mode, or for several different ones.
    """
    concepts = conditioning.concepts[adapter_name]
    request = conditioning.request()
    context = request.find(adapter_name, concepts) if request is not None else None
    if context is None:
        if training:
            raise UserValueError(
                f"No context is set for merging adapter {adapter_name!r} in training mode. Merge inside `with "
                "intervene(model, context):`."
            )
        return concepts.strengths([Context()])
    strengths = completed(context.strengths, len(concepts))
    if not context.uniform and not bool((strengths == strengths[:1]).all()):
        raise UserValueError(
            f"Only one context can be merged into a weight; {len(strengths)} different ones are set. Merge "
            "inside `with intervene(model, context):` with a single context."
        )
    return strengths[:1]


class HoldsMergedContexts:
    """What layers share into whose weights contexts are merged; a part of them, before PEFT's.

    A forward with adapters switched off takes out what is merged. PEFT leaves it out, which changes nothing for a LoRA.
    Ours acts in a context only, and there is none around a merged model: so it is put back.
    """

    merged_adapters: list[str]  # in the weight, of other methods, too
    merged_strengths: dict[str, Tensor]  # of each adapter in the weight
    set_aside: dict[str, Tensor]  # of those that were taken out while adapters are switched off

    def conditioning_of_model(self) -> Conditioning:
        """Return what the layers of the model share."""
        raise NotImplementedError

    def merged_weight(self, adapter_name: str, strengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight, what it is with an adapter in a context, of strengths (1, 1 + K), and what of it is new.

        Raises:
            ValueError: for an adapter that cannot be merged.
        """
        raise NotImplementedError

    def merge_strengths(self, adapter_name: str, strengths: Tensor, safe_merge: bool = False) -> None:
        """Write an adapter in a context, of strengths (1, 1 + K), into the weight.

        Raises:
            ValueError: for an adapter that cannot be merged, or (with `safe_merge`) a result that is not finite.
        """
        weight, merged, new = self.merged_weight(adapter_name, strengths)
        if safe_merge and not torch.isfinite(new).all():  # in PEFT's words
            raise UserValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        weight.data = merged
        self.merged_strengths[adapter_name] = strengths.detach().clone()
        self.conditioning_of_model().merged[adapter_name] = self.merged_strengths[adapter_name]
        self.merged_adapters.append(adapter_name)

    def take_out(self) -> None:
        """Unmerge until adapters are switched on again."""
        merged = dict(self.merged_strengths)
        cast(Any, self).unmerge()
        self.set_aside = merged

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off; what was merged before is merged again."""
        cast(Any, super()).enable_adapters(enabled)
        if enabled:
            for name, strengths in tuple(self.set_aside.items()):
                self.merge_strengths(name, strengths)
            self.set_aside = {}
