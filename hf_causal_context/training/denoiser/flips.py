"""Which samples are mirrored: half of them, but none whose context holds a concept that a mirror would change."""

from __future__ import annotations

from collections.abc import Sequence

from ...contexts import ConceptSet, Context
from ...errors import UserValueError
from ...messages.wording import quoted
from ..arguments import TrainingArguments
from ..noise import FLIP, chance_of


class Flips:
    """Decides about samples by `random_flip` and `flip_changes`.

    Raises:
        ValueError: for an unknown concept, or where no concept's images could be mirrored.
    """

    def __init__(self, arguments: TrainingArguments, concepts: ConceptSet) -> None:
        self.on, self._seed = arguments.random_flip, arguments.seed
        self._changed = frozenset(arguments.flip_changes)
        if unknown := sorted(self._changed - set(concepts)):
            raise UserValueError(
                f"--flip_changes names {quoted(unknown)}, which is no concept. Concepts: {quoted(concepts)}."
            )
        if self.on and self._changed == set(concepts):
            raise UserValueError(
                f"--flip_changes names all concepts, {quoted(concepts)}: only images of "
                f"{arguments.observational_name!r} would be mirrored, and every concept would be learned as not being "
                "mirrored. Leave --random_flip out."
            )

    def __call__(self, contexts: Sequence[str], slots: Sequence[int]) -> list[bool]:
        """Return whether the samples in some slots are mirrored."""
        return [
            self.on
            and self._changed.isdisjoint(Context.parse(context).targets)
            and bool(chance_of(self._seed, slot, FLIP).random() < 0.5)
            for context, slot in zip(contexts, slots, strict=True)
        ]
