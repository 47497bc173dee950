"""LoRA files that ComfyUI reads: for most bases those of diffusers or kohya, for Lumina 2 under names of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..bases.diffusion_base import DiffusionBase
from ..errors import UserValueError
from ..messages.wording import quoted

# Pipelines whose LoRA files of diffusers it reads.
_READ = (
    *("AuraFlowPipeline", "ChromaPipeline", "Flux2KleinPipeline", "Flux2Pipeline", "FluxPipeline"),
    *("HiDreamImagePipeline", "Krea2Pipeline", "QwenImagePipeline", "StableDiffusion3Pipeline", "ZImagePipeline"),
)
_UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # those of kohya
_LUMINA = "Lumina2Pipeline"
# Lumina 2: names of diffusers -> those of its first publication, in which query, key and value are one layer.
_NAMES = {"attn.to_out.0": "attention.out"}
_NAMES |= {f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)}
_QKV = ("to_q", "to_k", "to_v")
_MODULE = re.compile(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)")


def comfyui_format(base: DiffusionBase) -> Literal["kohya", "diffusers", "comfyui"]:
    """Return which files ComfyUI reads for a base; "comfyui" are those of `lumina_state`.

    Raises:
        ValueError: for a base of which it is not known to read any.
    """
    pipeline = type(base.pipe).__name__
    if pipeline in _UNETS:
        return "kohya"
    if pipeline == _LUMINA:
        return "comfyui"
    if pipeline in _READ:
        return "diffusers"
    known = quoted(sorted((*_READ, *_UNETS, _LUMINA)))
    raise UserValueError(
        f"ComfyUI is not known to read LoRA files for {pipeline}. It does for {known}. Use --format diffusers or peft "
        "for other tools, or merge the context into the base."
    )


def lumina_state(denoiser: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA of Lumina 2 under the names that ComfyUI reads.

    Args:
        denoiser: with its adapter.
        weights: of a baked context: "module.lora_A.weight" and "module.lora_B.weight".

    Raises:
        ValueError: for modules besides those of attention and feed-forward layers.
    """
    state: dict[str, Tensor] = {}
    attentions: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for module in dict.fromkeys(key.split(".lora_")[0] for key in weights):
        down, up = (weights[f"{module}.lora_{part}.weight"] for part in "AB")
        found = _MODULE.fullmatch(module)
        block, name = found.groups() if found else ("", module)
        if found and name in _NAMES:
            state |= _named(f"{block}.{_NAMES[name]}", down, up)
        elif found and name in {f"attn.{part}" for part in _QKV}:
            attentions.setdefault(block, {})[name.removeprefix("attn.")] = (down, up)
        else:
            raise UserValueError(
                f"The module {module!r} has no place in the files that ComfyUI reads for Lumina 2: these are of "
                "attention and feed-forward layers. Use --format diffusers, or train without it."
            )
    for block, parts in attentions.items():
        rows = [_rows(denoiser, f"{block}.attn.{part}") for part in _QKV]
        some_up = next(iter(parts.values()))[1]  # of the same device and dtype
        ups = [parts[part][1] if part in parts else some_up.new_zeros(n, 0) for part, n in zip(_QKV, rows, strict=True)]
        downs = [parts[part][0] for part in _QKV if part in parts]
        state |= _named(f"{block}.attention.qkv", torch.cat(downs), torch.block_diag(*ups))
    return state


def _named(module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"diffusion_model.{module}.lora_{part}.weight": w.contiguous() for part, w in (("A", down), ("B", up))}


def _rows(denoiser: nn.Module, module: str) -> int:
    layer = denoiser.get_submodule(module)
    features = layer.out_features
    assert isinstance(features, int)
    return features
