"""Tells the hooks how a diffusers pipeline multiplies samples, and takes contexts out of its attention arguments.

A denoiser that sees four rows cannot tell two prompts under guidance from two prompts with two images each; the call of
its pipeline can. So a pipeline is followed: it becomes an instance of a subclass of its class that reads the arguments
of every call (PyTorch's `fully_shard` does so with modules).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import WeakKeyDictionary

from torch import Tensor

from ..contexts import ContextBatch
from ..errors import UserValueError
from .conditioning.callers import COPIES
from .conditioning.hooks import take_context
from .conditioning.in_force import during_call, in_force
from .conditioning.rows import Call
from .lookup import known_conditionings
from .saving import named_as_without_adapters

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModularPipeline

    AnyPipeline: TypeAlias = DiffusionPipeline | ModularPipeline

# What says how many prompts a call has, first match first; some pipelines call their embeddings otherwise.
_EMBEDS = ("prompt_embeds", "prompt_embeds_t5", "prompt_embeds_qwen", "image_embeds")
_PROMPTS = ("prompt", *_EMBEDS, "class_labels", "batch_size", "image")

_LOCK = Lock()
_VISITS: WeakKeyDictionary[AnyPipeline, int] = WeakKeyDictionary()  # by how many each is followed for a while


class Followed:
    """What a followed pipeline's class has in front of the pipeline's own; subclasses may have more."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be pickled by name.
        _, _, *state = cast(tuple, super().__reduce_ex__(protocol))
        kind, stock, *_ = type(self).__bases__
        return _new, (stock, kind), *state

    @classmethod
    def _maybe_expand_lora_state_dict(cls, transformer: Any, lora_state_dict: Any) -> Any:
        # Flux looks for weights under the names that they have below one adapter at most.
        with named_as_without_adapters(transformer):
            return cast(Any, super())._maybe_expand_lora_state_dict(transformer, lora_state_dict)


def _new(stock: type, kind: type[Followed]) -> object:
    return object.__new__(_followed_class(stock, kind))


def follow(pipe: AnyPipeline, kind: type[Followed] = Followed) -> None:
    """Make the hooks know the calls of a pipeline; once is enough.

    Args:
        pipe: the pipeline, whose class changes.
        kind: what else its class gets.
    """
    if not isinstance(pipe, kind):
        pipe.__class__ = _followed_class(stock_class(type(pipe)), kind)


def unfollow(pipe: AnyPipeline) -> None:
    """Give a pipeline its own class back."""
    pipe.__class__ = stock_class(type(pipe))


@contextmanager
def track_calls(pipe: AnyPipeline) -> Iterator[None]:
    """Follow a pipeline for a while, if it is not followed anyway; in several threads, until the last is done."""
    with _LOCK:
        visits = _VISITS.get(pipe, 0)
        for_a_while = visits > 0 or not isinstance(pipe, Followed)
        if for_a_while:
            _VISITS[pipe] = visits + 1
            follow(pipe)
    try:
        yield
    finally:
        if for_a_while:
            with _LOCK:
                _VISITS[pipe] -= 1
                if not _VISITS[pipe]:
                    del _VISITS[pipe]
                    unfollow(pipe)


def stock_class(cls: type) -> type:
    """Return the pipeline's own class."""
    return cls.__bases__[1] if issubclass(cls, Followed) else cls


@functools.cache
def _followed_class(cls: type, kind: type[Followed]) -> type:
    signature = inspect.signature(cls.__call__)

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        context = _take_context(bound)
        running, owners = _call(bound), known_conditionings(self)
        if context is not None and not owners:
            raise UserValueError(
                f"A context was passed, and no component of {cls.__name__} has a causal context adapter any more, so "
                "it would change nothing. Load one with load_context_adapter(pipe, folder_or_repository)."
            )
        own = [owner.make_request(context) for owner in owners] if context is not None else []
        with in_force(own), during_call(owners, running):
            return cls.__call__(*bound.args, **bound.kwargs)

    # The same name, by which diffusers finds related pipelines and writes model_index.json.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (kind, cls), {"__call__": call, **names})


def _take_context(bound: inspect.BoundArguments) -> ContextBatch | None:
    """Take a context out of the attention arguments, which modular pipelines have among others without names."""
    context, bound.arguments = take_context(bound.arguments)
    if context is None and "kwargs" in bound.arguments:
        context, bound.arguments["kwargs"] = take_context(bound.arguments["kwargs"])
    return context


def _call(bound: inspect.BoundArguments) -> Call | None:
    defaults = {name: parameter.default for name, parameter in bound.signature.parameters.items()}
    given = {name: None if value is inspect.Parameter.empty else value for name, value in defaults.items()}
    state = getattr(bound.arguments.get("state"), "values", None)  # of a modular pipeline: what blocks before it made
    given |= state if isinstance(state, dict) else {}
    given |= bound.arguments | bound.arguments.get("kwargs", {})
    prompts = next((n for name in _PROMPTS if (n := _count(given.get(name))) is not None), None)
    copies: Any = next((given[name] for name in COPIES if given.get(name) is not None), 1)
    return None if prompts is None else Call(prompts, copies)


def _count(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # batch_size
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim > 0 else 1
    if isinstance(value, list | tuple):
        return len(value)
    return None if value is None else 1
