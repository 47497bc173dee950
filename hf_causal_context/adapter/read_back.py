"""Writes a baked LoRA, and reads it back as PEFT does for its users: what it would lose is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from .._files import complete_or_absent
from .._random import seeded
from ..errors import UserValueError
from ..messages.wording import quoted
from .config import CausalContextConfig
from .peft_type import PEFT_PREFIX
from .saving import write_adapter

_FOR_PIPELINES = "pytorch_lora_weights.safetensors"  # the first name that diffusers looks for


def write_lora(folder: Path, model: nn.Module, config: LoraConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a LoRA baked on a model as a folder; it appears complete, over an earlier one, or not at all.

    Raises:
        ValueError: if PEFT loads something else from it onto the base.
    """
    base = cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model
    with complete_or_absent(folder) as unfinished:
        write_adapter(unfinished, config, dict(weights))
        _check_reads_back(base, unfinished, weights)
        component = _component(base)
        if component is not None and all(".lora_" in key for key in weights):  # these have no place for whole modules
            renamed = {f"{component}.{key.removeprefix(PEFT_PREFIX)}": weight for key, weight in weights.items()}
            save_file(renamed, unfinished / _FOR_PIPELINES, metadata={"format": "pt"})


def _component(base: nn.Module) -> str | None:
    """Return what pipelines of diffusers call a model whose LoRA files they load; None of others, such as VAEs."""
    bases = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(base).__mro__}
    if "diffusers.UNet2DConditionLoadersMixin" in bases:
        return "unet"
    return "transformer" if "diffusers.PeftAdapterMixin" in bases and "Transformer" in type(base).__name__ else None


def is_resized(base: nn.Module, config: CausalContextConfig) -> bool:
    """Whether a language model has another vocabulary than where it was loaded from, as far as this machine knows."""
    if not isinstance(base, PreTrainedModel):
        return False
    for name in filter(None, (base.name_or_path, config.base_model_name_or_path)):
        try:
            stored = AutoConfig.from_pretrained(name, revision=config.revision or "main", local_files_only=True)
        except (OSError, ValueError):  # it is not here, or of no known kind
            continue
        sizes = {getattr(each.get_text_config(), "vocab_size", None) for each in (stored, base.config)}
        return len(sizes) > 1
    return False


def _check_reads_back(base: nn.Module, folder: Path, weights: Mapping[str, Tensor]) -> None:
    with warnings.catch_warnings(), seeded(None):
        warnings.simplefilter("ignore")  # they are for those who load it
        try:
            loaded = PeftModel.from_pretrained(cast(Any, _without_adapters(base)), str(folder))
            whole = any(".lora_" not in key for key in weights)
            found = get_peft_model_state_dict(loaded, save_embedding_layers=whole)
        except (ValueError, RuntimeError, KeyError) as error:
            raise _unreadable(base, str(error)) from error
    factors = {name: m.scaling["default"] for name, m in loaded.named_modules() if isinstance(m, LoraLayer)}
    lost = {
        key.partition(".lora_")[0].removesuffix(".weight")
        for key, weight in weights.items()
        if key not in found or not torch.equal(found[key], weight.to(found[key]))
    }
    lost |= {name for name, factor in factors.items() if factor != 1}
    if lost:
        names = quoted(sorted(name.removeprefix(PEFT_PREFIX) for name in lost)[:3])
        raise _unreadable(base, f"what {len(lost)} modules got is lost, such as that of {names}")


def _unreadable(base: nn.Module, reason: str) -> UserValueError:
    return UserValueError(
        f"PEFT cannot load this context as a LoRA onto a {type(base).__name__} as it was baked: {reason}. Merge it "
        "instead, and save the model: `with intervene(model, context): merged = model.merge_and_unload()`, then "
        "merged.save_pretrained(folder)."
    )


def _without_adapters(module: nn.Module) -> nn.Module:
    """Return a copy of a module without its adapters, which shares all weights, for PEFT to attach a LoRA to."""
    if isinstance(module, BaseTunerLayer):
        return _without_adapters(module.get_base_layer())
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _without_adapters(cast(nn.Module, module.original_module))
    twin = copy.copy(module)
    twin._modules = {n: m if m is None else _without_adapters(m) for n, m in module._modules.items()}
    twin._parameters = {
        name: nn.Parameter(p.detach(), requires_grad=False) if type(p) is nn.Parameter else p  # PEFT freezes them
        for name, p in module._parameters.items()
    }
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        setattr(twin, hooks, type(getattr(module, hooks))())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        twin.__dict__.pop(name, None)
    return twin
