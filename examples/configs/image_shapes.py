"""The published shapes of bases, as pipelines without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

# Tokens of a caption, where the pipeline does not pad captions to one length.
CAPTION_TOKENS = 512

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
_T5_XXL: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_T5_XXL |= {"feed_forward_proj": "gated-gelu", "vocab_size": 32128}
_QWEN_25_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
}
_QWEN_25_7B |= {"num_key_value_heads": 4, "vocab_size": 152064}
_QWEN_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
}
_QWEN_3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
_QWEN_3_4B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
_UNET_SD: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Shape:
    """A base, as `pipeline` makes it on the meta device; its captions are `conditions` (rows, dtype)."""

    title: str
    name: str
    pipeline: Callable[[torch.dtype], Any]
    conditions: Callable[[int, torch.dtype], dict[str, Any]]
    latent_channels: int


def _vae(channels: int) -> nn.Module:
    sides = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": channels}
    return diffusers.AutoencoderKL(**sides, **blocks)


def _clip(sizes: dict[str, Any], projected: bool = False) -> nn.Module:
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    config = transformers.CLIPTextConfig(**sizes, projection_dim=sizes["hidden_size"])
    return getattr(transformers, name)(config)


def _t5() -> nn.Module:
    encoder = transformers.T5EncoderModel(transformers.T5Config(**_T5_XXL))
    encoder.encoder.embed_tokens = encoder.shared
    return encoder


def _qwen_vl() -> nn.Module:
    config = transformers.Qwen2_5_VLConfig(text_config=_QWEN_25_7B, vision_config=_QWEN_VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _pipeline(name: str, scheduler: str, **parts: Callable[[], nn.Module]) -> Callable[[torch.dtype], Any]:
    def make(dtype: torch.dtype) -> Any:
        with init_empty_weights():
            modules: dict[str, Any] = {part: nn.Module.to(build(), dtype) for part, build in parts.items()}
        pipeline = getattr(diffusers, name)
        tokenizers = {f"tokenizer{part.removeprefix('text_encoder')}": None for part in parts if "text_enc" in part}
        if name == "StableDiffusionPipeline":
            modules |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return pipeline(scheduler=getattr(diffusers, scheduler)(), **modules, **tokenizers)

    return make


_FLOW = "FlowMatchEulerDiscreteScheduler"
SHAPES = {
    "sd15": Shape(
        "Stable Diffusion 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        _pipeline(
            "StableDiffusionPipeline",
            "DDPMScheduler",
            unet=lambda: diffusers.UNet2DConditionModel(**_UNET_SD),
            vae=lambda: _vae(4),
            text_encoder=lambda: _clip(_CLIP_L),
        ),
        lambda rows, dtype: {"encoder_hidden_states": torch.empty(rows, 77, 768, dtype=dtype)},
        4,
    ),
    "sdxl": Shape(
        "Stable Diffusion XL",
        "stabilityai/stable-diffusion-xl-base-1.0",
        _pipeline(
            "StableDiffusionXLPipeline",
            "DDPMScheduler",
            unet=lambda: diffusers.UNet2DConditionModel(**_UNET_XL),
            vae=lambda: _vae(4),
            text_encoder=lambda: _clip(_CLIP_L),
            text_encoder_2=lambda: _clip(_CLIP_G, projected=True),
        ),
        lambda rows, dtype: {
            "encoder_hidden_states": torch.empty(rows, 77, 2048, dtype=dtype),
            "text_embeds": torch.empty(rows, 1280, dtype=dtype),
        },
        4,
    ),
    "flux1-dev": Shape(
        "FLUX.1 dev",
        "black-forest-labs/FLUX.1-dev",
        _pipeline(
            "FluxPipeline",
            _FLOW,
            transformer=lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
            vae=lambda: _vae(16),
            text_encoder=lambda: _clip(_CLIP_L),
            text_encoder_2=_t5,
        ),
        lambda rows, dtype: {
            "encoder_hidden_states": torch.empty(rows, 512, 4096, dtype=dtype),
            "pooled_projections": torch.empty(rows, 768, dtype=dtype),
        },
        16,
    ),
    "qwen-image": Shape(
        "Qwen-Image",
        "Qwen/Qwen-Image",
        _pipeline(
            "QwenImagePipeline",
            _FLOW,
            transformer=diffusers.QwenImageTransformer2DModel,
            vae=diffusers.AutoencoderKLQwenImage,
            text_encoder=_qwen_vl,
        ),
        lambda rows, dtype: {
            "encoder_hidden_states": torch.empty(rows, CAPTION_TOKENS, 3584, dtype=dtype),
            "encoder_hidden_states_mask": torch.ones(rows, CAPTION_TOKENS, dtype=torch.long),
        },
        16,
    ),
    "z-image": Shape(
        "Z-Image",
        "Tongyi-MAI/Z-Image",
        _pipeline(
            "ZImagePipeline",
            _FLOW,
            transformer=diffusers.ZImageTransformer2DModel,
            vae=lambda: _vae(16),
            text_encoder=lambda: transformers.Qwen3Model(transformers.Qwen3Config(**_QWEN_3_4B)),
        ),
        lambda rows, dtype: {
            "text": torch.empty(rows, CAPTION_TOKENS, 2560, dtype=dtype),
            "mask": [slice(None)] * rows,  # all tokens: which a tensor without values could not say
        },
        16,
    ),
}


def linear_weights(module: nn.Module) -> dict[nn.Linear, Tensor]:
    """Weights that quantization makes smaller: of all linear layers, except those that libraries leave as they are."""
    kept = {"lm_head", *(getattr(module, "_keep_in_fp32_modules", None) or ())}
    return {
        layer: layer.weight
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and not kept & set(name.split("."))
    }
