"""Parts that published pipelines are made of, in their sizes and without weights.

Sizes of text encoders are those of the configurations that their authors published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

FLOW = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Shape:
    """A base, as `pipeline` makes it on the meta device; its captions are `conditions` (rows, dtype).

    `sources` says where its sizes were read, `first` what a user does before a run.
    """

    title: str
    name: str
    pipeline: Callable[[torch.dtype], Any]
    conditions: Callable[[int, torch.dtype], dict[str, Any]]
    sources: str
    first: str = ""


@dataclass(frozen=True)
class LanguageShape:
    """A language model, as `build` makes it, and texts of so many tokens."""

    title: str
    name: str
    build: Callable[[], nn.Module]
    tokens: int = 1024

    def model(self, dtype: torch.dtype) -> Any:
        """Return it on the meta device."""
        with init_empty_weights():
            return _tied(self.build()).to(dtype)


def pipeline(
    name: str, scheduler: str = FLOW, parts: Mapping[str, Any] | None = None, **settings: Any
) -> Callable[[torch.dtype], Any]:
    """Return what makes a pipeline of a class, of parts by their names, on the meta device."""

    def make(dtype: torch.dtype) -> Any:
        with init_empty_weights():
            modules: dict[str, Any] = {part: nn.Module.to(build(), dtype) for part, build in (parts or {}).items()}
        tokenizers = {f"tokenizer{part.removeprefix('text_encoder')}": None for part in modules if "text_enc" in part}
        given = modules | tokenizers | settings
        return getattr(diffusers, name)(scheduler=getattr(diffusers, scheduler)(), **given)

    return make


def captions(**sizes: int | tuple[int, ...]) -> Callable[[int, torch.dtype], dict[str, Any]]:
    """Return what makes conditions by their names: tensors of some sizes a row, or masks of so many tokens."""

    def make(rows: int, dtype: torch.dtype) -> dict[str, Any]:
        return {name: _condition(rows, size, dtype) for name, size in sizes.items()}

    return make


def _condition(rows: int, size: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(size, tuple):
        return torch.empty(rows, *size, dtype=dtype)
    return ones(rows, size).bool()


def ones(*size: int) -> Tensor:
    """Return ones that are written out, so that they have values where other tensors have none."""
    return torch.tensor(np.ones(size, dtype=np.float32))


def clip_l() -> nn.Module:
    """CLIP's text encoder of 123 M parameters."""
    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, num_attention_heads=12))


def clip_l_projected() -> nn.Module:
    """CLIP's text encoder of 123 M parameters, with its projection."""
    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    config = transformers.CLIPTextConfig(**sizes, num_attention_heads=12, projection_dim=768)
    return transformers.CLIPTextModelWithProjection(config)


def clip_g() -> nn.Module:
    """OpenCLIP's text encoder of 695 M parameters, with its projection."""
    sizes: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    config = transformers.CLIPTextConfig(**sizes, num_attention_heads=20, projection_dim=1280)
    return transformers.CLIPTextModelWithProjection(config)


def t5_xxl() -> nn.Module:
    """T5's encoder of 4.8 B parameters."""
    return _t5(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)


def byt5() -> nn.Module:
    """The encoder of glyphs of HunyuanImage."""
    return _t5(d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6, vocab_size=1510)


def _t5(**sizes: Any) -> nn.Module:
    encoder = transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **sizes))
    encoder.encoder.embed_tokens = encoder.shared
    return encoder


def umt5(**sizes: Any) -> nn.Module:
    """UMT5's encoder: of 5.7 B parameters, or of other sizes."""
    xxl: dict[str, Any] = {
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "vocab_size": 256384,
    }
    config = transformers.UMT5Config(feed_forward_proj="gated-gelu", **(xxl | sizes))
    encoder = transformers.UMT5EncoderModel(config)
    encoder.encoder.embed_tokens = encoder.shared
    return encoder


_QWEN_3: dict[str, Any] = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
_QWEN_3 |= {"head_dim": 128, "vocab_size": 151936}
_QWEN_3_4B: dict[str, Any] = _QWEN_3 | {"hidden_size": 2560, "intermediate_size": 9728}


def qwen_3_4b(causal: bool = False) -> nn.Module:
    """Qwen3 of 4 B parameters."""
    config = transformers.Qwen3Config(**_QWEN_3_4B, tie_word_embeddings=True)
    return _tied(transformers.Qwen3ForCausalLM(config)) if causal else transformers.Qwen3Model(config)


def smollm2() -> nn.Module:
    """SmolLM2 of 1.7 B parameters."""
    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    sizes |= {"num_attention_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def qwen_3_8b() -> nn.Module:
    """Qwen3 of 8 B parameters, with its head."""
    config = transformers.Qwen3Config(**_QWEN_3, hidden_size=4096, intermediate_size=12288)
    return transformers.Qwen3ForCausalLM(config)


def _tied(model: Any) -> nn.Module:
    if model.config.tie_word_embeddings:  # which does not outlast the way to the meta device
        model.lm_head._parameters["weight"] = model.model.embed_tokens.weight
    return model


def qwen_3_vl_4b() -> nn.Module:
    """Qwen3-VL of 4 B parameters, with its eyes."""
    seeing: dict[str, Any] = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
    }
    seeing["deepstack_visual_indexes"] = (5, 11, 17)
    config = transformers.Qwen3VLConfig(text_config=_QWEN_3_4B, vision_config=seeing)
    return transformers.Qwen3VLModel(config)


def qwen_25_vl_7b() -> nn.Module:
    """Qwen2.5-VL of 7 B parameters, with its eyes."""
    reading = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    reading |= {"num_key_value_heads": 4, "vocab_size": 152064}
    seeing = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=reading, vision_config=seeing)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def mistral_small() -> nn.Module:
    """Mistral Small 3 of 24 B parameters, with its eyes."""
    reading = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32}
    reading |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "model_type": "mistral"}
    seeing = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    seeing |= {"patch_size": 14, "image_size": 1540, "head_dim": 64, "model_type": "pixtral"}
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=reading, vision_config=seeing)
    )


def llama_3_8b(causal: bool = False, vocab_size: int = 128256) -> nn.Module:
    """Llama 3 of 8 B parameters."""
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocab_size}
    config = transformers.LlamaConfig(**sizes)
    return transformers.LlamaForCausalLM(config) if causal else transformers.LlamaModel(config)


def gemma_2_2b() -> nn.Module:
    """Gemma 2 of 2.6 B parameters."""
    return transformers.Gemma2Model(transformers.Gemma2Config())


def glm_4_9b() -> nn.Module:
    """GLM-4 of 9 B parameters."""
    return transformers.GlmModel(transformers.GlmConfig())


def vae(channels: int, **sizes: Any) -> nn.Module:
    """Stable Diffusion's autoencoder, with so many channels of latents."""
    sides = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": channels}
    return diffusers.AutoencoderKL(**sides, **(blocks | sizes))
