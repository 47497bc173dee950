"""The one context that a merge writes into a weight."""

from __future__ import annotations

from torch import Tensor

from ..contexts import Context
from ..errors import UserValueError
from .conditioning.hooks import Conditioning
from .conditioning.request import completed


def strengths_to_merge(conditioning: Conditioning, adapter_name: str, training: bool) -> Tensor:
    """Return the strengths (1, 1 + K) of the context that is set; without one at inference, the observational one's.

    Raises:
        ValueError: without a context in training mode, or for several different ones.
    """
    concepts = conditioning.concepts[adapter_name]
    request = conditioning.request()
    context = request.find(adapter_name, concepts) if request is not None else None
    if context is None:
        if training:
            raise UserValueError(
                f"No context is set for merging adapter {adapter_name!r} in training mode. Merge inside `with "
                "intervene(model, context):`."
            )
        return concepts.strengths([Context()])
    strengths = completed(context.strengths, len(concepts))
    if not context.uniform and not bool((strengths == strengths[:1]).all()):
        raise UserValueError(
            f"Only one context can be merged into a weight; {len(strengths)} different ones are set. Merge "
            "inside `with intervene(model, context):` with a single context."
        )
    return strengths[:1]
