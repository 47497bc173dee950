"""Tiny pipelines of newer flow transformers, with random weights; some make images of 32 pixels at least."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.guiders import AdaptiveProjectedMixGuidance
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from .tiny_parts import (
    LANGUAGE,
    LETTERS,
    _clip,
    _clip_tokenizer,
    _qwen_tokenizer,
    _qwen_vl_config,
    _random,
    _t5,
    _t5_tokenizer,
    _vae,
)


def _gemma_tokenizer():
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def _gemma():
    return _random(transformers.Gemma2Model(transformers.Gemma2Config(**LANGUAGE, num_hidden_layers=2)))


def _glm_tokenizer():
    """Words are its tokens, after a first one."""
    words = ["<pad>", "<unk>", "</s>", "<sop>", "a", "cat", "two", "very", "large", "dogs"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<sop> $A", special_tokens=[("<sop>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", padding_side="left"
    )


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        num_attention_heads=2,
        num_cross_attention_heads=2,
        num_layers=1,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
        timestep_scale=0.5,
    )
    both: dict[str, Any] = {"block_out_channels": (8,) * 3, "layers_per_block": (1,) * 3, "qkv_multiscales": ((),) * 3}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}
    vae = diffusers.AutoencoderDC(**sides, latent_channels=4, scaling_factor=0.5)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(_gemma_tokenizer(), _gemma(), _random(vae), _random(transformer), scheduler)


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        cap_feat_dim=8,
    )
    vae = _vae(depth=4, shift_factor=0.1)  # the pipeline takes 8 pixels per latent for granted
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return diffusers.Lumina2Pipeline(_random(transformer), scheduler, vae, _gemma(), _gemma_tokenizer())


def aura_flow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    for name, weight in transformer.named_parameters():
        if "norm1.linear" in name:
            weight.data *= 5  # else the gates of attention are nearly closed
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    text_encoder = _random(transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return diffusers.AuraFlowPipeline(_t5_tokenizer(), text_encoder, _vae(), _random(transformer), scheduler)


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        sample_size=8,
        num_layers=1,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        rope_axes_dim=(8, 8),
    )
    text = {**LANGUAGE, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 2}
    text_encoder = _random(transformers.GlmModel(transformers.GlmConfig(**text)))
    shifts = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shifts)
    return diffusers.CogView4Pipeline(_glm_tokenizer(), text_encoder, _vae(), _random(transformer), scheduler)


def hunyuan_image(**kwargs):
    transformer = diffusers.HunyuanImageTransformer2DModel(
        num_attention_heads=1,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        text_embed_dim=8,
        rope_axes_dim=(4, 4),
        **kwargs,
    )
    sizes: dict[str, Any] = {"block_out_channels": (32, 32), "layers_per_block": 1, "spatial_compression_ratio": 2}
    channels = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
    vae = diffusers.AutoencoderKLHunyuanImage(**channels, **sizes, sample_size=16, scaling_factor=0.75)
    sizes = {"vocab_size": 384, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    return diffusers.HunyuanImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        _random(vae),
        _random(transformers.Qwen2_5_VLForConditionalGeneration(_qwen_vl_config(3))),  # the last two are not used
        _qwen_tokenizer(),
        _random(transformers.T5EncoderModel(transformers.T5Config(**sizes))),
        transformers.ByT5Tokenizer(),
        _random(transformer),
        AdaptiveProjectedMixGuidance(),
    )


def hidream_image():
    # The pipeline makes images of 128 x 128 latents only.
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=16,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[32, 8],
        text_emb_dim=32,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        llama_layers=[0, 1],
    )
    clips = [part for _ in range(2) for part in (_clip(projected=True, length=128), _clip_tokenizer())]
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE, num_hidden_layers=2))
    return diffusers.HiDreamImagePipeline(
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        _vae(depth=1, shift_factor=0.1, mid_block_add_attention=False),
        *clips,
        _t5(),
        _t5_tokenizer(),
        _random(llama),
        _glm_tokenizer(),
        _random(transformer),
    )


FLOWS = (sana, lumina2, aura_flow, cogview4, hunyuan_image, hidream_image)
