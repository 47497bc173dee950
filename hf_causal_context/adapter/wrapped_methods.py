"""Methods of a base model that know of its adapters, put on the instance in place of its class's own."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import nn


class WrappedMethod:
    """A method of one model; subclasses say in `__call__` what it does around the original."""

    name: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        # Weak: a cycle would keep the memory of a deleted model until the next garbage collection.
        self._model = weakref.ref(model)
        # What others put on the instance before, such as FSDP2, which gathers weights around `generate`.
        self._earlier: Callable[..., Any] | None = model.__dict__.get(self.name)

    def __getstate__(self) -> tuple[nn.Module | None, Callable[..., Any] | None]:
        return self._model(), self._earlier

    def __setstate__(self, state: tuple[nn.Module, Callable[..., Any] | None]) -> None:
        model, self._earlier = state
        self._model = weakref.ref(model)

    @property
    def __signature__(self) -> inspect.Signature:
        """The original's, which libraries look at."""
        return inspect.signature(self.original)

    @classmethod
    def put_on(cls, model: nn.Module) -> None:
        """Replace the method of a model whose class has it; once is enough."""
        if hasattr(type(model), cls.name) and not isinstance(model.__dict__.get(cls.name), WrappedMethod):
            setattr(model, cls.name, cls(model))

    @classmethod
    def take_off(cls, model: nn.Module) -> None:
        """Give a model its own method back."""
        method = model.__dict__.get(cls.name)
        if isinstance(method, WrappedMethod):
            del model.__dict__[cls.name]
            if method._earlier is not None:
                model.__dict__[cls.name] = method._earlier

    @property
    def model(self) -> Any:
        """The model it is a method of."""
        model = self._model()
        assert model is not None, "its model was deleted"
        return model

    @property
    def original(self) -> Callable[..., Any]:
        """The method without this: the class's own, unless others had put one on the instance."""
        return self._earlier or cast(Any, getattr(type(self.model), self.name)).__get__(self.model)
