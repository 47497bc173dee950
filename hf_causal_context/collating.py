"""Contexts for other people's training loops: a collator of transformers or TRL that also makes the mask.

Shapes: B rows, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .contexts import ConceptSet, Context, context_text
from .errors import UserValueError
from .messages.wording import quoted


class ContextCollator:
    """Wraps a collator that makes a row of each feature: adds `context` (B, K), the mask of the features' contexts.

    The trainer must keep the column: `remove_unused_columns=False` in its arguments. Where features are tokenized
    already, columns that hold text are left out, because no collator can stack them.

    Args:
        collate: the collator to wrap, such as `DataCollatorForLanguageModeling`.
        concepts: those of the adapter, in its order.
        context_column: holds text such as "thick+slant", a list of names, or a mapping to strengths.
        observational_name: what the empty context is called.

    Raises:
        ValueError: when called, for features without the column, contexts with unknown concepts, or a collator that
            joins several features in one row.

    Example:
        >>> from transformers import default_data_collator
        >>> collator = ContextCollator(default_data_collator, ("thick", "slant"))
        >>> collator([{"input_ids": [1], "context": "thick"}, {"input_ids": [2], "context": "obs"}])["context"]
        tensor([[1., 0.],
                [0., 0.]])
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], Any],
        concepts: Sequence[str] | ConceptSet,
        context_column: str = "context",
        observational_name: str = "obs",
    ) -> None:
        self.collate = collate
        self.concepts = concepts if isinstance(concepts, ConceptSet) else ConceptSet(tuple(concepts))
        self.context_column, self.observational_name = context_column, observational_name

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Return the wrapped collator's batch, with the mask."""
        contexts = [self._context(feature) for feature in features]
        mask = self.concepts.mask(contexts)
        batch = self.collate([self._rest(feature) for feature in features])
        rows = {len(batch[name]) for name in ("input_ids", "labels") if name in batch}
        if rows - {len(features)}:
            raise UserValueError(
                f"The collator made {(rows - {len(features)}).pop()} rows of {len(features)} features, so it cannot be "
                "known which row has which context. Take one that makes a row of each feature: without packing, "
                "padding-free batches, or pairs of chosen and rejected texts."
            )
        batch["context"] = mask
        return batch

    def _context(self, feature: Mapping[str, Any]) -> Context:
        if self.context_column not in feature:
            raise UserValueError(
                f"The features have no column {self.context_column!r}, but {quoted(feature)}. Keep it: "
                "remove_unused_columns=False in the trainer's arguments, and no packing, which joins rows of different "
                "contexts."
            )
        return Context.parse(context_text(feature[self.context_column], self.observational_name))

    def _rest(self, feature: Mapping[str, Any]) -> dict[str, Any]:
        tokenized = "input_ids" in feature
        return {
            name: value
            for name, value in feature.items()
            if name != self.context_column and not (tokenized and _is_text(value))
        }


def _is_text(value: object) -> bool:
    """Text, messages, or lists of them; None, too, which such a column may hold."""
    if isinstance(value, list | tuple):
        return any(_is_text(item) for item in value)
    return value is None or isinstance(value, str | Mapping)
