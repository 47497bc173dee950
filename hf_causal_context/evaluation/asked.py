"""What an evaluation is asked about: the adapter's concepts, and the contexts to sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Sized
from itertools import combinations

from torch import nn

from ..adapter.layer import CausalContextLayer
from ..contexts import ConceptSet, Context
from ..data import InterventionalData
from ..errors import UserValueError
from ..messages.wording import quoted
from .classifiers import at_one
from .evidence import MIN_REAL_ROWS

MAX_UNSEEN_PAIRS = 6


def adapter_concepts(model: nn.Module, data: InterventionalData, missing: str) -> ConceptSet:
    """Return the concepts of a model's active adapters, which must be those of the data.

    Args:
        model: the base with its adapter.
        data: what it was trained on.
        missing: what to say of a model without an adapter.

    Raises:
        ValueError: without an adapter, or for other concepts than the data's.
    """
    layer = next((module for module in model.modules() if isinstance(module, CausalContextLayer)), None)
    if layer is None:
        raise UserValueError(missing)
    active = [name for name in layer.active_adapters if name in layer.concepts]
    concepts = ConceptSet(tuple(concept for name in active for concept in layer.concepts[name]))
    check_concepts(concepts, data)
    return concepts


def check_concepts(concepts: Collection[str], data: InterventionalData) -> None:
    """Refuse data with other concepts than an adapter's (ValueError)."""
    if set(concepts) != set(data.concepts):
        raise UserValueError(
            f"The adapter has the concepts {quoted(concepts)}, the data {quoted(data.concepts)}. They must be the "
            "same: rename the contexts of the data, or leave the others out."
        )


def contexts_to_sample(
    concepts: ConceptSet, wanted: Sequence[Context] | None, real: Mapping[Context, Sized], trained: Collection[Context]
) -> tuple[list[Context], list[str]]:
    """Return the contexts to sample, in order, and notes: the empty one, single concepts, and combinations.

    Without `wanted` these are all that have real rows, at other strengths than 1 enough of them to compare with, and
    where no unseen one has, some unseen pairs.
    """
    chosen, notes = (wanted, []) if wanted is not None else _default_contexts(concepts, real, trained)
    return ordered({Context(), *map(Context, concepts), *chosen}), notes


def ordered(contexts: Collection[Context]) -> list[Context]:
    """Contexts by their number of targets, then by name."""
    return sorted(contexts, key=lambda context: (len(context.targets), str(context)))


def _default_contexts(
    concepts: ConceptSet, real: Mapping[Context, Sized], trained: Collection[Context]
) -> tuple[list[Context], list[str]]:
    real = {context: rows for context, rows in real.items() if at_one(context) or len(rows) >= MIN_REAL_ROWS}
    if any(len(rows) >= MIN_REAL_ROWS for context, rows in real.items() if context not in trained):
        return list(real), []
    unseen = [pair for a, b in combinations(concepts, 2) if (pair := Context(a, b)) not in trained]
    notes = []
    if len(unseen) > MAX_UNSEEN_PAIRS:
        notes.append(
            f"Of {len(unseen)} unseen pairs the first {MAX_UNSEEN_PAIRS} were sampled; --contexts names others."
        )
    return [*real, *unseen[:MAX_UNSEEN_PAIRS]], notes
