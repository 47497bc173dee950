"""LoRA for causal concepts: one adapter whose concepts compose."""

from typing import TYPE_CHECKING, Any

from .adapter.baking import bake, save_baked
from .adapter.config import CausalContextConfig
from .adapter.effects import CausalEffects, causal_effects
from .adapter.intervene import intervene
from .adapter.model import CausalContextModel, acyclicity_penalty
from .adapter.registration import register
from .adapter.storage.layout import AdapterError
from .collating import ContextCollator
from .context_module import ContextModule
from .contexts import ConceptSet, Context
from .inference.pipelines import load_context_adapter, unload_context_adapter

if TYPE_CHECKING:
    from .hub.loading import AutoCausalContextModel, CausalContextPipeline
    from .inference.counterfactuals import Counterfactual, counterfactual

register()

__version__ = "0.2.0"
__all__ = [
    "AdapterError",
    "AutoCausalContextModel",
    "CausalContextConfig",
    "CausalContextModel",
    "CausalContextPipeline",
    "CausalEffects",
    "ConceptSet",
    "Context",
    "ContextCollator",
    "ContextModule",
    "Counterfactual",
    "acyclicity_penalty",
    "bake",
    "causal_effects",
    "counterfactual",
    "intervene",
    "load_context_adapter",
    "save_baked",
    "unload_context_adapter",
]


def __getattr__(name: str) -> Any:
    # They need diffusers, or much of the package, which is not imported before it is used.
    if name in ("Counterfactual", "counterfactual"):
        from .inference import counterfactuals

        return getattr(counterfactuals, name)
    if name in ("AutoCausalContextModel", "CausalContextPipeline"):
        from .hub import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
