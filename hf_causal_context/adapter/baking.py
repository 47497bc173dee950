"""Bake a context into a plain LoRA that every tool reads, without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..contexts import ConceptSet, Context, ContextLike, as_context
from ..errors import UserValueError
from .config import CausalContextConfig
from .layer import CausalContextLayer, ConvNd
from .lookup import adapted_layers, place
from .lora_conversion import without_idle_rows
from .peft_type import PEFT_PREFIX, PREFIX
from .read_back import is_resized, write_lora
from .storage.layout import TOKENS
from .trained_tokens import baked_tokens


def bake(model: nn.Module, context: ContextLike, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Turn an adapter under one context into a LoRA: lora_A = M(m) Down, lora_B = (alpha / W) Up.

    The observational part comes along at its strength in the context, 1 by default.

    Exact in float32; weights of adapters in bf16 or fp16 are rounded once. Modules in `modules_to_save` come along, as
    do trained tokens, and embeddings that were resized.

    Args:
        model: a PeftModel, or a model the adapter was injected into.
        context: one context, as for `intervene`; concepts it does not name are not intervened on.
        adapter_name: the adapter to bake.

    Returns:
        PEFT's config of a LoRA, and its weights under PEFT's names: what `PeftModel.from_pretrained` reads.

    Raises:
        ValueError: for an unknown adapter or concept, a mechanism that is not linear (`expressive_depth` > 0), or a
            convolution that PEFT's LoRA does not compute the same way (groups, dilation, padding mode), or a strength
            of the observational part where there is none.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = adapter_config(model, adapter_name)
    strengths = context_strengths(config, [as_context(context)])
    weights: dict[str, Tensor] = {}
    paths: list[str] = []
    transposed = False
    for name, layer in adapted_layers(base).items():
        if adapter_name not in layer.causal_context_down:
            continue
        _check_lora_computes_the_same(name, layer)
        a, b = layer.lora_weights(adapter_name, strengths)
        a, b = without_idle_rows(a, b)
        dtype = cast(Tensor, layer.causal_context_up[adapter_name].weight).dtype
        kernel = (1,) * (a.ndim - 2)
        weights[f"{PEFT_PREFIX}{name}.lora_A.weight"] = a.to(dtype, copy=True).contiguous()
        weights[f"{PEFT_PREFIX}{name}.lora_B.weight"] = b.view(*b.shape, *kernel).to(dtype, copy=True).contiguous()
        paths.append(name)
        transposed |= isinstance(layer.get_base_layer(), Conv1D)
    # Of equal ranks: some tools divide one alpha by the rank that they see in a tensor.
    rank = max(weight.shape[0] for key, weight in weights.items() if key.endswith(".lora_A.weight"))
    weights = {key: _padded(weight, 0 if ".lora_A." in key else 1, rank) for key, weight in weights.items()}
    for key, weight in get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=is_resized(base, config)
    ).items():
        if PREFIX not in key and not key.endswith(TOKENS):  # of modules_to_save, and the embeddings
            weights[key if key.startswith(PEFT_PREFIX) else PEFT_PREFIX + key] = weight.detach().clone()
    weights |= {PEFT_PREFIX + key: rows for key, rows in baked_tokens(base, adapter_name, strengths).items()}
    modules = {place(name) for name, _ in base.named_modules()}
    ends = tuple(f".{path}" for path in paths)
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # factor 1: the scale is in lora_B
        target_modules=sorted(paths),
        # PEFT takes "proj_out" for "blocks.0.proj_out" too.
        exclude_modules=sorted(n for n in modules - set(paths) if n.endswith(ends)) or None,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        fan_in_fan_out=transposed,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
        inference_mode=True,
    )
    return lora_config, weights


def context_strengths(config: CausalContextConfig, contexts: Sequence[Context]) -> Tensor:
    """Strengths (B, 1 + K) of contexts for an adapter with this config.

    Raises:
        ValueError: for unknown concepts, or a strength of the observational part where there is none.
    """
    for context in contexts:
        if context.observational != 1 and not config.observational_rank:
            raise UserValueError(
                f"Context {str(context)!r} sets the strength of the observational part, and the adapter has none "
                "(observational_rank=0). Leave it out."
            )
    return ConceptSet(config.concepts).strengths(contexts)


def adapter_config(model: nn.Module, adapter_name: str = "default") -> CausalContextConfig:
    """Return the config of a causal context adapter in a model.

    Raises:
        ValueError: for an unknown adapter.
    """
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter_name) if isinstance(configs, dict) else None
    if not isinstance(config, CausalContextConfig):
        names = [name for name, c in configs.items() if isinstance(c, CausalContextConfig)]
        raise UserValueError(f"The model has no causal context adapter {adapter_name!r}. It has: {names}.")
    return config


def check_linear(config: CausalContextConfig) -> None:
    """Refuse an adapter that is no change of weights in any context, before its base is loaded (ValueError)."""
    if config.expressive_depth:
        raise UserValueError(
            "The adapter cannot be baked or merged: its mechanism is not linear (expressive_depth > 0)."
        )


def save_baked(model: nn.Module, context: ContextLike, folder: str | Path, adapter_name: str = "default") -> Path:
    """Bake a context and write it as a folder that `PeftModel.from_pretrained` loads without this package.

    A denoiser of diffusers' LoRA pipelines gets a second file in it, which `load_lora_weights(folder)` of these reads.
    The folder appears complete or not at all, and only if PEFT loads from it what was baked.

    Raises:
        FileExistsError: if the folder exists and is not empty.
        ValueError: as `bake`, and for a base on which PEFT does not find all of the LoRA again.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty. Choose another folder, or remove it.")
    write_lora(folder, model, *bake(model, context, adapter_name))
    return folder


def _check_lora_computes_the_same(name: str, layer: CausalContextLayer) -> None:
    if not isinstance(layer, ConvNd):
        return
    base = cast(nn.Conv2d, layer.get_base_layer())
    # PEFT's LoRA copies kernel, stride and padding of a convolution, and nothing else.
    problems = [
        f"{attribute}={value}"
        for attribute, value, plain in (
            ("groups", base.groups, base.groups == 1),
            ("dilation", base.dilation, all(d == 1 for d in base.dilation)),
            ("padding_mode", base.padding_mode, base.padding_mode == "zeros"),
        )
        if not plain
    ]
    if problems:
        raise UserValueError(
            f"The convolution {name!r} has {', '.join(problems)}, which PEFT's LoRA ignores, so a baked LoRA would "
            "give another output. Keep the adapter"
            + ("." if base.groups > 1 else ", or merge the context into the weights with merge_adapter().")
        )


def _padded(weight: Tensor, dim: int, rank: int) -> Tensor:
    """Return a weight with as many zeros behind it as make it of a rank."""
    shape = list(weight.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([weight, weight.new_zeros(shape)], dim)
