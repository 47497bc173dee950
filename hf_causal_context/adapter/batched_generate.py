"""Keeps the contexts of transformers' continuous batching right: `generate_batch` and its managers.

A manager runs the model on a thread of its own, in the context in which it was made, and it can be kept: with the keys
and values of earlier prompts, and on GPUs with graphs, which are those of that context.
"""

from __future__ import annotations

from typing import Any, cast

from ..contexts import ContextBatch
from ..errors import UserValueError
from .conditioning.in_force import in_force, innermost_request
from .lookup import known_conditionings
from .wrapped_methods import WrappedMethod


class BatchedGenerate(WrappedMethod):
    """`generate_batch` of a model with adapters, with the argument of `generate`: the original ignores unknown ones."""

    name = "generate_batch"

    def __call__(self, *args: Any, context: ContextBatch | None = None, **kwargs: Any) -> Any:
        owners = known_conditionings(self.model) if context is not None else []
        with in_force([owner.make_request(cast(ContextBatch, context)) for owner in owners]):
            return self.original(*args, **kwargs)


class CheckedBatching(WrappedMethod):
    """What makes the managers of a model with adapters, and finds those that were kept."""

    name = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = self._asked()
        manager = self.original(*args, **kwargs)
        if vars(manager).setdefault("_causal_contexts", asked) != asked:
            raise UserValueError(
                "The manager for continuous batching that this model keeps was made in another context, and holds keys "
                "and values of it. Call model.destroy_cached_continuous_batching_manager() first."
            )
        return manager

    def _asked(self) -> list[Any]:
        """What is in force for each conditioning: adapters with their strengths."""
        asked = []
        for owner in known_conditionings(self.model):
            request = innermost_request(owner)
            contexts = {} if request is None else request.adapters
            if any(len(context.strengths) > 1 for context in contexts.values()):
                raise UserValueError(
                    "Continuous batching puts the tokens of all prompts into one row, so they cannot have different "
                    "contexts. Pass one context, and call it once for each."
                )
            asked.append({name: context.strengths.tolist() for name, context in contexts.items()})
        return asked
