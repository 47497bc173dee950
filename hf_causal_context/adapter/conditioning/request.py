"""What `intervene` and `context=` ask for: contexts checked and encoded for the adapters they concern.

Strengths (S, 1 + K) are those of the observational part and of the concepts; a mask (S, K) that was passed stays as it
is, since a tensor made here would be a graph of its own in a compiled model. `completed` adds the column.

Shapes: S samples that have a context, N rows of the model's input, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ...contexts import ConceptSet, Context, as_context, as_contexts
from ...errors import UserTypeError, UserValueError
from ...messages.wording import quoted
from .regions import Regions
from .rows import Call, match_layer_rows, match_samples


@dataclass
class AdapterContext:
    """The context of one adapter, as asked for: strengths or a mask, and how the model's callers multiply samples."""

    concepts: ConceptSet
    strengths: Tensor
    uniform: bool  # known without looking at values: every sample has the same context
    images_per_prompt: int
    guidance_copies: int
    given_as_tensor: bool
    regions: Regions | None = None  # the first context is then the background's, the others are theirs

    def to(self, device: torch.device) -> AdapterContext:
        """Move strengths made from names to the input's device, once.

        Raises:
            ValueError: for a mask that the user passed and that lies elsewhere.
        """
        if self.strengths.device != device:
            if self.given_as_tensor:
                raise UserValueError(
                    f"The intervention mask lies on {self.strengths.device}, the model's input on {device}. Move it: "
                    f"mask.to({str(device)!r})."
                )
            self.strengths = self.strengths.to(device)
        return self

    @property
    def completed(self) -> Tensor:
        """The strengths (S, 1 + K)."""
        return completed(self.strengths, len(self.concepts))

    @property
    def changes_something(self) -> bool:
        """Whether an adapter does anything in it."""
        return bool(self.completed.any())

    def outside_forward(self, num_rows: int, call: Call | None, layer_name: str) -> Tensor:
        """Return the strengths for N rows of a layer in a part that runs on its own, such as a VAE's decoder.

        Raises:
            ValueError: for contexts of regions, for pieces of what a pipeline makes, such as some of a clip's frames,
                and for prompts of `generate` with different numbers of images.
        """
        if self.regions is not None:
            raise UserValueError(
                "Contexts per region were given, and a part of an adapted model runs without the model's own call (as "
                "a VAE's decoder does), so it cannot be known which tokens it sees. Use one context for the whole "
                "image."
            )
        if call is not None and not self.uniform:
            call.check_part(num_rows)
            if call.encodes_media(layer_name):  # once for each prompt: `generate` repeats what comes out
                return match_layer_rows(self.rows(call.prompts, call), num_rows, layer_name, call.ragged)
        return self.rows(num_rows, call)

    def rows(self, num_rows: int, call: Call | None) -> Tensor:
        """Return the strengths for N rows of the model's input: (1, 1 + K) or (N, 1 + K); see `rows.match_samples`."""
        if self.regions is not None:
            return self.strengths[:1]  # the background's
        if self.uniform and num_rows % len(self.strengths) == 0:
            return self.strengths[:1]
        return match_samples(self.strengths, num_rows, self.images_per_prompt, self.guidance_copies, call)


class Owner(Protocol):
    """The conditioning of one base model."""

    open_requests: int  # in all tasks and threads


@dataclass(eq=False)
class Request:
    """The contexts in force for one base model; requests nest."""

    owner: Owner
    adapters: dict[str, AdapterContext]
    outer: Request | None
    encode: Callable[[ConceptSet], AdapterContext] | None  # for adapters added later; None if one adapter was named
    contexts: tuple[Context, ...] = ()
    checked_for: tuple[str, ...] = ()  # the active adapters whose concepts the names were checked against
    call: Call | None = None  # what runs the model now
    named: str | None = None  # the one adapter that it is for: the others keep their contexts
    matrices: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)  # of this call: see `causal_matrices`
    looked_at: bool = False  # the model, for how it orders rows
    ended: bool = False  # tasks that were started inside may still hold it
    token: Token | None = None  # of the task or thread that opened it

    def within(self, outer: Request | None, same_owner: Request | None) -> Request:
        """Return the same contexts inside another request; of one for a named adapter, the other adapters keep theirs.

        Args:
            outer: the request in force, of whatever model.
            same_owner: the innermost one of this model.
        """
        if self.named is None or same_owner is None:
            return replace(self, outer=outer)
        adapters = same_owner.adapters | self.adapters
        return replace(self, adapters=adapters, encode=same_owner.encode, outer=outer)

    def during(self, call: Call) -> Request:
        """Return the same contexts during a call; refuses (ValueError) another number of them than of prompts."""
        for context in self.adapters.values():
            if not context.uniform and context.regions is None:
                call.check(len(context.strengths))
        return replace(self, call=call, matrices={}, looked_at=False)

    def over(self, regions: Regions) -> Request:
        """Return the same contexts as those of the background and of regions, for all rows."""
        encode = self.encode
        return replace(
            self,
            adapters={name: replace(context, regions=regions) for name, context in self.adapters.items()},
            encode=encode and (lambda concepts: replace(encode(concepts), regions=regions)),
        )

    @property
    def is_mixed(self) -> bool:
        """Whether samples may have different contexts."""
        return any(not context.uniform and context.regions is None for context in self.adapters.values())

    def regions(self) -> list[Regions]:
        """Return those that adapters have contexts for."""
        return [context.regions for context in self.adapters.values() if context.regions is not None]

    def find(self, adapter_name: str, concepts: ConceptSet) -> AdapterContext | None:
        """Return the context of an adapter; one that was added after the request was made gets its own encoding.

        Raises:
            ValueError: for one in whose place there is another one since, with other concepts.
        """
        found = self.adapters.get(adapter_name)
        if found is not None and found.concepts.names != concepts.names:
            raise UserValueError(
                f"The context that is set is for an adapter {adapter_name!r} with the concepts "
                f"{quoted(found.concepts)}, and in its place there is one with {quoted(concepts)} since. Set the "
                "context again: open the `with intervene(...)` block after the adapter is there."
            )
        if found is None and self.encode is not None:
            found = self.adapters[adapter_name] = self.encode(concepts)
        return found


def normalize(context: object, observational: float | None) -> tuple[tuple[Context, ...], Tensor | None]:
    """Whatever a user may pass, as contexts (one, or one per sample) or as a mask.

    `observational`, if it is not None, becomes the strength of the observational part in each of the contexts.

    Raises:
        TypeError: for None and anything that is not a context.
        ValueError: for a strength that is not a finite number, or differs from the one in a context.
    """
    if isinstance(context, Tensor):
        Context(observational=observational)  # refuses what is no strength
        return (), context
    if context is None:
        raise UserTypeError("context=None is not a context. The observational context is ().")
    per_sample = as_contexts(context)
    contexts = per_sample if per_sample is not None else (as_context(context),)
    return tuple(Context(each, observational=observational) for each in contexts), None


def restricted(context: Context, concepts: ConceptSet) -> Context:
    """What a context says of one adapter; where it names concepts of others only, the observational part is off."""
    own = {name: strength for name, strength in context.strengths.items() if name in concepts}
    named = bool(own) or not context.targets
    return Context(own, observational=context.observational if named else 0)


def completed(strengths: Tensor, num_concepts: int, observational: float = 1.0) -> Tensor:
    """Strengths (S, 1 + K) of what may be a mask (S, K), with the observational part at a strength."""
    if strengths.shape[1] > num_concepts:
        return strengths
    return torch.cat([strengths.new_full((len(strengths), 1), observational), strengths], dim=1)


def for_mechanism(strengths: Tensor, num_concepts: int, observational_rank: int) -> Tensor:
    """Strengths (S, 1 + K) or a mask (S, K) as a causal layer takes them: without a part, it has no strength of one."""
    return completed(strengths, num_concepts) if observational_rank else strengths[:, -num_concepts:]


def check_one_adapter_per_mask(mask: Tensor, addressed: dict[str, ConceptSet]) -> None:
    """Columns of a mask have no names: refuse one that could be meant for several adapters (ValueError)."""
    if len(addressed) > 1:
        raise UserValueError(
            f"A mask of shape {tuple(mask.shape)} does not say for which of the active adapters {quoted(addressed)} it "
            "is. Pass adapter_name= to intervene()."
        )


def check_mask_is_for(active: dict[str, ConceptSet], given: Mapping[str, AdapterContext]) -> None:
    """Refuse (ValueError) a mask that was given for an adapter with other concepts than those that are active now."""
    for context in given.values():
        check_one_adapter_per_mask(context.strengths, active)
        for name, concepts in active.items():
            if concepts.names != context.concepts.names:
                raise UserValueError(
                    f"The mask that is set has columns for {quoted(context.concepts)}, and adapter {name!r}, which was "
                    f"activated since, has {quoted(concepts)}. Set a mask for it: open the `with intervene(...)` block "
                    "after set_adapter(...)."
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
                raise UserValueError(
                    f"Concept {target!r} belongs to several active adapters: {quoted(owners)}. Say which one is "
                    f"meant: intervene(model, context, adapter_name={owners[0]!r})."
                )
            if not owners and addressed:
                elsewhere = [name for name, concepts in others.items() if target in concepts]
                raise UserValueError(
                    f"Unknown concept {target!r} in context {str(context)!r}. Known concepts: {quoted(known)} (of "
                    f"{'adapter' if len(addressed) == 1 else 'adapters'} {quoted(addressed)}). "
                    + (
                        f"It belongs to adapter {elsewhere[0]!r}: activate that one, or name it with adapter_name=."
                        if elsewhere
                        else "Correct the name."
                    )
                )
