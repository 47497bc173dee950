"""Methods of a base model that know of its adapters, put on the instance in place of its class's own."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, ClassVar, cast

from torch import nn


class WrappedMethod:
    """A method of one model; subclasses say in `__call__` what it does around the class's own."""

    name: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        # Weak: a cycle would keep the memory of a deleted model until the next garbage collection.
        self._model = weakref.ref(model)

    def __getstate__(self) -> nn.Module | None:
        return self._model()

    def __setstate__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's own, which libraries look at."""
        return inspect.signature(getattr(type(self.model), self.name).__get__(self.model))

    @classmethod
    def put_on(cls, model: nn.Module) -> None:
        """Replace the method of a model whose class has it; once is enough."""
        if hasattr(type(model), cls.name) and not isinstance(model.__dict__.get(cls.name), WrappedMethod):
            setattr(model, cls.name, cls(model))

    @classmethod
    def take_off(cls, model: nn.Module) -> None:
        """Give a model its own method back."""
        model.__dict__.pop(cls.name, None)

    @property
    def model(self) -> Any:
        """The model it is a method of."""
        model = self._model()
        assert model is not None, "its model was deleted"
        return model

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's own method."""
        return cast(Any, getattr(type(self.model), self.name))(self.model, *args, **kwargs)
