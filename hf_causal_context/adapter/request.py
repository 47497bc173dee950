"""What `intervene` and `context=` ask for: contexts checked and encoded for the adapters they concern.

Shapes: S samples that have a context, N rows of the model's input, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..contexts import ConceptSet, Context, as_context, as_contexts, quoted
from .rows import PipelineCall, match_samples

if TYPE_CHECKING:
    from .conditioning import Conditioning


@dataclass
class AdapterContext:
    """The context of one adapter, as asked for: a mask (S, K), and how the model's callers multiply samples."""

    mask: Tensor
    uniform: bool  # known without looking at values: every sample has the same context
    images_per_prompt: int
    guidance_copies: int
    given_as_tensor: bool

    def to(self, device: torch.device) -> AdapterContext:
        """Move a mask made from names to the input's device, once.

        Raises:
            ValueError: for a mask that the user passed and that lies elsewhere.
        """
        if self.mask.device != device:
            if self.given_as_tensor:
                raise ValueError(
                    f"The intervention mask lies on {self.mask.device}, the model's input on {device}. Move it: "
                    f"mask.to({str(device)!r})."
                )
            self.mask = self.mask.to(device)
        return self

    def rows(
        self, num_rows: int, prompts_of_generate: Callable[[], int | None], call: PipelineCall | None = None
    ) -> Tensor:
        """The mask for N rows of the model's input: (1, K) or (N, K); see `rows.match_samples`."""
        if self.uniform and num_rows % self.mask.shape[0] == 0:
            return self.mask[:1]
        return match_samples(
            self.mask, num_rows, self.images_per_prompt, self.guidance_copies, prompts_of_generate, call
        )


@dataclass
class Request:
    """The contexts in force for one base model on one thread; requests nest."""

    owner: Conditioning
    adapters: dict[str, AdapterContext]
    outer: Request | None
    encode: Callable[[ConceptSet], AdapterContext] | None  # for adapters added later; None if one adapter was named
    contexts: tuple[Context, ...] = ()
    checked_for: tuple[str, ...] | None = None  # the active adapters whose concepts the names were checked against
    call: PipelineCall | None = None  # the running call of a followed pipeline

    def during(self, call: PipelineCall) -> Request:
        """The same contexts during a pipeline's call; refuses (ValueError) another number of them than of prompts."""
        for context in self.adapters.values():
            if not context.uniform:
                call.check(context.mask.shape[0])
        return replace(self, call=call)

    def find(self, adapter_name: str, concepts: ConceptSet) -> AdapterContext | None:
        """The context of an adapter; one that was added after the request was made gets its own encoding."""
        found = self.adapters.get(adapter_name)
        if found is None and self.encode is not None:
            found = self.adapters[adapter_name] = self.encode(concepts)
        return found


def normalise(context: object) -> tuple[tuple[Context, ...], Tensor | None]:
    """Whatever a user may pass, as contexts (one, or one per sample) or as a mask.

    Raises:
        TypeError: for None and anything that is not a context.
    """
    if isinstance(context, Tensor):
        return (), context
    if context is None:
        raise TypeError("context=None is not a context. The observational context is ().")
    per_sample = as_contexts(context)
    return per_sample if per_sample is not None else (as_context(context),), None


def check_one_adapter_per_mask(mask: Tensor, addressed: dict[str, ConceptSet]) -> None:
    """Columns of a mask have no names: refuse one that could be meant for several adapters (ValueError)."""
    if len(addressed) > 1:
        raise ValueError(
            f"A mask of shape {tuple(mask.shape)} does not say for which of the active adapters {quoted(addressed)} it "
            "is. Pass adapter_name= to intervene()."
        )


def check_names(
    contexts: Sequence[Context],
    addressed: dict[str, ConceptSet],
    others: Mapping[str, ConceptSet] = MappingProxyType({}),
) -> None:
    """Refuse concepts that no addressed adapter has, or that several have (ValueError); others are not addressed."""
    known = tuple(name for concepts in addressed.values() for name in concepts)
    for context in contexts:
        for target in context.targets:
            owners = [name for name, concepts in addressed.items() if target in concepts]
            if len(owners) > 1:
                raise ValueError(
                    f"Concept {target!r} belongs to several active adapters: {quoted(owners)}. Say which one is "
                    f"meant: intervene(model, context, adapter_name={owners[0]!r})."
                )
            if not owners and addressed:
                elsewhere = [name for name, concepts in others.items() if target in concepts]
                raise ValueError(
                    f"Unknown concept {target!r} in context {str(context)!r}. Known concepts: {quoted(known)} (of "
                    f"{'adapter' if len(addressed) == 1 else 'adapters'} {quoted(addressed)}). "
                    + (
                        f"It belongs to adapter {elsewhere[0]!r}: activate that one, or name it with adapter_name=."
                        if elsewhere
                        else "Correct the name."
                    )
                )
