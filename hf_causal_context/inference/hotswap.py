"""Puts the weights of one adapter in the place of another's, in the same tensors: nothing is compiled anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..adapter.conditioning.hooks import Conditioning
from ..adapter.config import CausalContextConfig
from ..adapter.lookup import adapted_layers, conditionings
from ..errors import UserValueError
from ..messages.wording import quoted

# What a model does with the weights, besides their names and shapes.
_FIELDS = (
    *("concepts", "concept_rank", "rank_pattern", "observational_rank", "alpha", "mechanism", "perfect_interventions"),
    *("anchored", "expressive_depth", "concept_graph", "concept_order", "trainable_token_indices"),
)
_SHOWN = 3  # differences that a message lists

Parts = Mapping[str, tuple[CausalContextConfig, dict[str, Tensor]]]


def check_swap(modules: Mapping[str, nn.Module], parts: Parts, adapter_name: str, source: str) -> None:
    """Refuse a swap for an adapter of another configuration.

    Args:
        modules: component -> network, of those that have the adapter now.
        parts: component -> config and weights of the one to come.
        adapter_name: of both.
        source: what to call the one to come in messages.

    Raises:
        ValueError: naming the differences; where there is no such adapter, or while it is merged into the weights.
    """
    if not modules:
        raise UserValueError(
            f"hotswap=True replaces a loaded adapter, and the pipeline has none of the name {adapter_name!r}. Load the "
            "first one without it."
        )
    if modules.keys() != parts.keys():
        differences = [f"it adapts {quoted(sorted(parts))}, the loaded one {quoted(sorted(modules))}"]
    else:
        differences = [text for name in parts for text in _differences(modules[name], *parts[name], adapter_name)]
    if differences:
        raise UserValueError(
            f"{source} cannot be swapped in for adapter {adapter_name!r}, which has another configuration: "
            f"{'; '.join(differences[:_SHOWN])}. Unload that one first (unload_context_adapter), and load this without "
            "hotswap=True."
        )
    for component, module in modules.items():
        if any(adapter_name in layer.merged_adapters for layer in adapted_layers(module).values()):
            raise UserValueError(
                f"Adapter {adapter_name!r} is merged into the weights of pipe.{component}, so it cannot be swapped. "
                "Unmerge it first (unfuse_lora)."
            )


def swap(modules: Mapping[str, nn.Module], parts: Parts, adapter_name: str) -> None:
    """Put the weights and the calibration of an adapter that `check_swap` let through in place of the loaded one's."""
    for component, (config, weights) in parts.items():
        module = modules[component]
        set_peft_model_state_dict(module, weights, adapter_name)
        config.inference_mode = True
        cast(Any, module).peft_config[adapter_name] = config
        Conditioning.changes += 1
        for conditioning in conditionings(module):
            conditioning.calibrations[adapter_name] = config.knots()


def _differences(
    module: nn.Module, config: CausalContextConfig, weights: Mapping[str, Tensor], adapter_name: str
) -> list[str]:
    loaded = cast(Any, module).peft_config[adapter_name]
    found = [
        f"{name}={new!r}, and {old!r} of the loaded one"
        for name in _FIELDS
        if (new := getattr(config, name)) != (old := getattr(loaded, name))
    ]
    tensors = get_peft_model_state_dict(module, adapter_name=adapter_name, save_embedding_layers=False)
    found += [f"it has no {name!r}" for name in tensors if name not in weights]
    found += [f"the loaded one has no {name!r}" for name in weights if name not in tensors]
    return found
