"""Saves a base model that carries adapters: the base under its own names, the adapters in folders beside it.

Without this, `save_pretrained` of a model or a pipeline would write the adapted modules under names that no reload
knows, and the reload would draw those weights at random.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import WEIGHTS, complete_or_absent
from ..errors import UserValueError
from ..messages.wording import quoted
from .config import CausalContextConfig
from .lookup import adapted_layers
from .peft_type import PEFT_PREFIX
from .wrapped_methods import WrappedMethod


class SavedWithoutAdapters(WrappedMethod):
    """`save_pretrained` of a model with adapters, which pipelines call, too."""

    name = "save_pretrained"

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        layers = adapted_layers(model)
        configs = getattr(model, "peft_config", {})
        names = [name for name, config in configs.items() if _is_ours(config)]
        others = configs.keys() - names
        # transformers' own integration of PEFT saves the adapter only, as its users expect; of two kinds, neither.
        integrated = getattr(model, "_hf_peft_config_loaded", False) and hasattr(model, "get_adapter_state_dict")
        if not layers or (integrated and not (names and others)):
            return self.original(save_directory, *args, **kwargs)
        merged = next((layer for layer in layers.values() if layer.merged), None)
        if merged is not None:
            raise UserValueError(
                f"Adapters {merged.merged_adapters} are merged into the weights of {type(model).__name__}, so the base "
                "cannot be saved as it was. Call unmerge_adapter() (of a pipeline, unfuse_lora()) first, or "
                "merge_and_unload() to keep the merged weights for good."
            )
        call = inspect.signature(self.original).bind(save_directory, *args, **kwargs)
        if call.arguments.get("push_to_hub"):
            raise UserValueError(
                "save_pretrained(push_to_hub=True) would upload the base alone, before the adapter is written beside "
                "it. Call save_pretrained(folder), and upload the folder (`hf upload`), or push_to_hub(repository)."
            )
        if (state := call.arguments.get("state_dict")) is not None:  # which Accelerate has gathered, under our names
            call.arguments["state_dict"] = _without_adapters(model, state)
        if integrated:
            model._hf_peft_config_loaded = False
        try:
            with named_as_without_adapters(model):
                result = self.original(*call.args, **call.kwargs)
        finally:
            if integrated:
                model._hf_peft_config_loaded = True
        for name in names if call.arguments.get("is_main_process", True) else ():
            folder = Path(save_directory) / name
            with complete_or_absent(folder) as unfinished:
                write_adapter_of(model, name, unfinished)
            warnings.warn(
                f"{type(model).__name__} was saved without its causal context adapter {name!r}, which lies beside it "
                f"in {folder}. After loading the pipeline: load_context_adapter(pipe, folder_of_the_pipeline"
                + (f", adapter_name={name!r})." if name != "default" else ")."),
                stacklevel=2,
            )
        if others:
            warnings.warn(
                f"{type(model).__name__} was saved without the adapters of other methods, {quoted(sorted(others))}, "
                "but for those fused into its weights. Keep their files, and load them again (load_lora_weights).",
                stacklevel=2,
            )
        return result


class SavesLoraOnly(WrappedMethod):
    """`save_lora_adapter` of a model of diffusers, which writes weights of any adapter into a file that is a LoRA's."""

    name = "save_lora_adapter"

    def __call__(self, save_directory: str | Path, adapter_name: str = "default", *args: Any, **kwargs: Any) -> Any:
        if _is_ours(getattr(self.model, "peft_config", {}).get(adapter_name)):
            raise UserValueError(
                f"save_lora_adapter(): {adapter_name!r} is a causal context adapter, and nothing could load it from "
                "the file of a LoRA. save_pretrained(folder) writes it beside the base, for load_context_adapter; "
                "save_baked(model, context, folder) writes one context as a LoRA."
            )
        return self.original(save_directory, adapter_name, *args, **kwargs)


@contextmanager
def named_as_without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the body, the state dict of a model holds its base's weights alone, under the base's names."""
    handle = model.register_state_dict_post_hook(_rename)
    try:
        yield
    finally:
        handle.remove()


def write_adapter(folder: Path, config: PeftConfig, weights: dict[str, Tensor]) -> None:
    """Write what `PeftModel.from_pretrained` reads; the folder appears complete, over an earlier one, or not at all."""
    with complete_or_absent(folder) as unfinished:
        _write(unfinished, config, weights)


def write_adapter_of(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Write one adapter of a model into a folder, which may hold other files."""
    config: PeftConfig = copy.copy(cast(Any, model).peft_config[adapter_name])
    config.auto_mapping = {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
    }  # as PeftModel.save_pretrained records it
    _write(folder, config, _weights(model, adapter_name))


def _write(folder: Path, config: PeftConfig, weights: dict[str, Tensor]) -> None:
    config.save_pretrained(str(folder))
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _is_ours(config: object) -> bool:
    return isinstance(config, CausalContextConfig)


def _weights(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    weights = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): weight.contiguous() for key, weight in weights.items()}


def _without_adapters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    if any(".base_layer." in name for name in state):  # else the names are the base's already
        _rename(model, state, "", None)
    return state


def _rename(model: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """The weights of a model (a state dict, changed in place) under the names that they have without adapters."""
    for name, module in reversed(list(model.named_modules())):  # adapters of others may lie around ours
        inside = f"{prefix}{name}."
        if isinstance(module, BaseTunerLayer):
            kept = f"{inside}base_layer."
        elif isinstance(module, TrainableTokensWrapper):
            kept = f"{inside}token_adapter."  # which has its base's name by now
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept = f"{inside}original_module."
        else:
            continue
        for key in [key for key in state if key.startswith(inside)]:
            weight = state.pop(key)
            if key.startswith(kept):
                state[inside + key.removeprefix(kept)] = weight
