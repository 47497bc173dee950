"""A judge of the user's own: a function that reads a text, and says in numbers what is in it.

Shapes: N texts, A attributes.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import isfunction
from typing import cast

import torch
from torch import Tensor

from ..errors import UserValueError
from ..messages.progress import ProgressBar
from ..messages.wording import quoted, short_repr

Judge = Callable[[str], Mapping[str, float]]


def load_judge(name: str) -> Judge:
    """Return the function of a dotted name, such as "my_module.judge", from here or from what is installed.

    It is code: the name must be one that the user typed, never one that came with an adapter or with data.

    Raises:
        ValueError: for a name of another form, or of no function.
    """
    module, _, function = name.rpartition(".")
    if function == "py" or "/" in name or os.sep in name:
        raise UserValueError(
            f"--judge={name}: give a dotted name such as judge.shows, of a module and its function, not a file. Run "
            "the command where the file is."
        )
    if not module or not all(name.split(".")):
        raise UserValueError(f"--judge={name} must be a module and a function, such as my_module.judge.")
    if os.getcwd() not in sys.path:  # installed commands do not look here
        sys.path.append(os.getcwd())
    try:
        there = import_module(module)
    except SyntaxError as error:
        raise UserValueError(f"--judge={name}: the module {module!r} cannot be read: {error}. Correct it.") from error
    except ImportError as error:
        raise UserValueError(
            f"--judge={name}: the module {module!r} cannot be imported ({error}). Run the command where {module}.py is."
        ) from error
    if not callable(found := getattr(there, function, None)):
        own = [
            key
            for key, value in vars(there).items()
            if isfunction(value) and value.__module__ == module and key[0] != "_"
        ]
        has = f"It has {quoted(own)}. Name one of them." if own else "It has none of its own. Write one into it."
        raise UserValueError(f"--judge={name}: the module {module!r} has no function {function!r}. {has}")
    return cast(Judge, found)


class Judged:
    """What a judge says of texts.

    Attributes:
        names: of the A things that it says something of, from its first answer.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.names: tuple[str, ...] = ()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Read texts (N) -> (N, A).

        Raises:
            ValueError: for an answer that is no mapping from the same names to finite numbers.
        """
        return torch.tensor([self._read(text) for text in ProgressBar(texts, desc="judge", unit="text")])

    def _read(self, text: str) -> list[float]:
        answer = self._judge(text)
        names = tuple(answer) if isinstance(answer, Mapping) else ()
        self.names = self.names or names
        if not names or set(names) != set(self.names):
            before = f", and the same names as before: {quoted(self.names)}" if self.names else ""
            raise UserValueError(
                f"The judge answered {short_repr(answer)} to {short_repr(text)}. It must answer with numbers by name, "
                f'such as {{"loud": 1.0, "formal": 0.0}}{before}.'
            )
        try:
            numbers = [float(answer[name]) for name in self.names]
        except (TypeError, ValueError) as error:
            raise UserValueError(
                f"The judge answered {short_repr(answer)} to {short_repr(text)}, not with numbers by name: {error}."
            ) from error
        if not all(map(math.isfinite, numbers)):
            raise UserValueError(
                f"The judge answered {short_repr(answer)} to {short_repr(text)}. Its numbers must be finite, for any "
                "text, the empty one included: correct it."
            )
        return numbers
