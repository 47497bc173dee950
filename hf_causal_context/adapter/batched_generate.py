"""Keeps the contexts of transformers' continuous batching right: `generate_batch` and its managers.

A manager runs the model on a thread of its own, in the context in which it was made, and it can be kept: with the keys
and values of earlier prompts, and on GPUs with graphs, which are those of that context.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import nn

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
        asked = _asked(self.model)
        manager = self.original(*args, **kwargs)
        if isinstance(manager, _OfOneContext):
            manager.check_context()
        else:
            manager.__class__ = _class_of_one_context(type(manager))
            manager.causal_contexts = asked
        return manager


class _OfOneContext:
    """What a manager's class has in front of transformers' own: it runs, and takes prompts, in its own context only."""

    causal_contexts: list[Any]
    model: Any

    def check_context(self) -> None:
        if _asked(self.model) != self.causal_contexts:
            raise UserValueError(
                "The manager for continuous batching that this model has was made in another context, and holds keys "
                "and values of it. Start it and add prompts inside that context's `with intervene(...)` block. For "
                "this one, call model.destroy_cached_continuous_batching_manager() first, and make another manager."
            )

    def warmup(self) -> None:
        self.check_context()
        cast(Any, super()).warmup()

    def start(self) -> None:
        self.check_context()
        cast(Any, super()).start()

    def add_request(self, *args: Any, **kwargs: Any) -> str | None:
        self.check_context()
        return cast(Any, super()).add_request(*args, **kwargs)


@functools.cache
def _class_of_one_context(cls: type) -> type:
    return type(cls.__name__, (_OfOneContext, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _asked(model: nn.Module) -> list[Any]:
    """What is in force for each conditioning: adapters with their strengths.

    Raises:
        ValueError: for several contexts.
    """
    asked = []
    for owner in known_conditionings(model):
        request = innermost_request(owner)
        contexts = {} if request is None else request.adapters
        if any(len(context.strengths) > 1 for context in contexts.values()):
            raise UserValueError(
                "Continuous batching puts the tokens of all prompts into one row, so they cannot have different "
                "contexts. Pass one context, and call it once for each; or generate(), where each row has its own."
            )
        asked.append({name: context.strengths.tolist() for name, context in contexts.items()})
    return asked
