"""Modules of an adapter that get no gradient, because the model does not call them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import nn

from ...adapter.peft_type import PEFT_PREFIX, PREFIX
from ...errors import UserValueError
from .parts import adapted_models


class UntrainedModulesError(UserValueError):
    """Modules of the adapter take no part in the training."""


class Untrained:
    """The modules of an adapter that had no gradient yet; a model without an adapter has none.

    Blocks may be skipped and experts get no tokens. So a module that takes no part in a step is no fault, as long as
    others do whose paths differ from its own in numbers only.

    Args:
        model: the base with its adapter, or several of a pipeline.
        num_processes: of the run. Among several, a gradient that is missing in one would be waited for in all.
    """

    def __init__(self, model: nn.Module, num_processes: int) -> None:
        self._trained: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters() if adapted_models(model) else ():
            if parameter.requires_grad:
                module = name.replace(PEFT_PREFIX, "", 1).partition(f".{PREFIX}")[0]
                self._trained[module].append(parameter)
        self._left, self._several, self._steps = list(self._trained), num_processes > 1, 0

    def look(self, step: int) -> None:
        """Look at the gradients of a step, counted from 1, when they are complete.

        Raises:
            UntrainedModulesError: for modules that have no gradient, nor have others of their kind, in the first step
                of this process; among several processes, for any without one in any step.
        """
        self._steps += 1
        looked_at = self._trained if self._several else self._left
        self._left = [module for module in looked_at if all(p.grad is None for p in self._trained[module])]
        if self._left and self._several:
            raise UntrainedModulesError(
                f"Step {step}: {_listed(self._left)} got no gradient in this process. Among several processes all "
                "modules must take part in every step. Leave these out of target_modules, or train in one process."
            )
        if self._left and self._steps == 1:
            alive = _kinds(self._trained.keys() - set(self._left))
            dead = [module for module in self._left if not alive & _kinds([module])]
            if dead:
                raise UntrainedModulesError(
                    f"Step {step}: {_listed(dead)} got no gradient, nor did any other of that kind: the model does "
                    "not call them in this training. Leave them out of target_modules."
                )

    def report(self) -> str | None:
        """Return a sentence about the modules that never had a gradient, if there are any."""
        if not self._left or not self._steps:
            return None
        return f"{_listed(self._left)} got no gradient in any of {self._steps:,} steps, and have no effect."


def _kinds(modules: Iterable[str]) -> set[tuple[str, ...]]:
    """Paths without the numbers of blocks and experts."""
    return {tuple(part for part in module.split(".") if not part.isdigit()) for module in modules}


def _listed(modules: Sequence[str]) -> str:
    return f"{len(modules)} adapted modules, such as {modules[0]!r},"
