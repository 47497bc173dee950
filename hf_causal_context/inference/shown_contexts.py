"""Which contexts to show of an adapter, where nobody says."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from ..contexts import ConceptSet, Context

_SHOWN_PAIRS = 6


def shown_contexts(concepts: ConceptSet, combined: Iterable[str] = ()) -> list[Context]:
    """No intervention, every concept, and combinations: those given, else the first pairs.

    Raises:
        ValueError: for unknown concepts.
    """
    singles = [Context(name) for name in concepts]
    chosen = [Context.parse(context) for context in combined]
    concepts.strengths(chosen)  # refuses unknown names
    chosen = chosen or [a | b for a, b in combinations(singles, 2)][:_SHOWN_PAIRS]
    return list(dict.fromkeys([Context(), *singles, *chosen]))
