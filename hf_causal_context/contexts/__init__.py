"""Contexts and the concepts that they intervene on: names, strengths and masks."""

from .concept_set import ConceptSet
from .context import OBSERVATIONAL, Context, ContextBatch, ContextLike, as_context, as_contexts
from .in_data import context_text, refuse_obs

__all__ = [
    "OBSERVATIONAL",
    "ConceptSet",
    "Context",
    "ContextBatch",
    "ContextLike",
    "as_context",
    "as_contexts",
    "context_text",
    "refuse_obs",
]
