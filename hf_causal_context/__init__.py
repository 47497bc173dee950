"""LoRA for causal concepts: one adapter whose concepts compose."""

from .adapter.conditioning import intervene
from .adapter.config import CausalContextConfig
from .adapter.effects import CausalEffects, causal_effects
from .adapter.export import bake, save_baked
from .adapter.model import CausalContextModel, acyclicity_penalty
from .adapter.registration import register
from .context_module import ContextModule
from .contexts import ConceptSet, Context

register()

__version__ = "0.1.0"
__all__ = [
    "CausalContextConfig",
    "CausalContextModel",
    "CausalEffects",
    "ConceptSet",
    "Context",
    "ContextModule",
    "acyclicity_penalty",
    "bake",
    "causal_effects",
    "intervene",
    "save_baked",
]
