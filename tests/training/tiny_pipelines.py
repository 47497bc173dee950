"""Tiny pipelines of every supported family, with random weights; images of 16 pixels, latents of 8, where they can."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import transformers

from .tiny_flows import FLOWS
from .tiny_parts import (
    LANGUAGE,
    MROPE,
    _clip,
    _clip_tokenizer,
    _flux2_vae,
    _qwen_tokenizer,
    _qwen_vae,
    _qwen_vl_config,
    _random,
    _t5,
    _t5_tokenizer,
    _vae,
)

PIXELS: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
TEXT_UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": (16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
}
TRANSFORMER: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 1, "in_channels": 4, "sample_size": 8}


def ddpm(**kwargs):
    return diffusers.DDPMPipeline(
        _random(diffusers.UNet2DModel(**PIXELS, in_channels=1, out_channels=1, **kwargs)), diffusers.DDPMScheduler()
    )


def ddpm_classes():
    return ddpm(num_class_embeds=5)


def ddim():
    unet = _random(diffusers.UNet2DModel(**PIXELS))
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(prediction_type="sample"))


def stable_diffusion():
    unet = _random(diffusers.UNet2DConditionModel(**TEXT_UNET, cross_attention_dim=16))
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, prediction_type="v_prediction")
    return diffusers.StableDiffusionPipeline(
        _vae(), _clip(), _clip_tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_xl(**vae):
    unet = diffusers.UNet2DConditionModel(
        **TEXT_UNET,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return diffusers.StableDiffusionXLPipeline(
        _vae(**vae),
        _clip(),
        _clip(projected=True),
        _clip_tokenizer(),
        _clip_tokenizer(),
        _random(unet),
        diffusers.EulerDiscreteScheduler(),
    )


def stable_diffusion_3():
    transformer = diffusers.SD3Transformer2DModel(
        **TRANSFORMER,
        out_channels=4,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    clips = [_clip(projected=True), _clip_tokenizer(), _clip(projected=True), _clip_tokenizer()]
    return diffusers.StableDiffusion3Pipeline(
        _random(transformer),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        _vae(shift_factor=0.1),
        *clips,
        _t5(),
        _t5_tokenizer(),
    )


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        num_attention_heads=2,
        num_layers=1,
        num_single_layers=1,
        in_channels=16,
        attention_head_dim=8,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        _vae(shift_factor=0.1),
        _clip(),
        _clip_tokenizer(),
        _t5(),
        _t5_tokenizer(),
        _random(transformer),
    )


def _flux2_transformer(**kwargs):
    transformer = diffusers.Flux2Transformer2DModel(
        num_attention_heads=2,
        num_layers=1,
        num_single_layers=1,
        in_channels=16,
        attention_head_dim=8,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        **kwargs,
    )
    with torch.no_grad():
        transformer.double_stream_modulation_img.linear.weight *= 4  # else so narrow a one hardly looks at attention
    return _random(transformer)


def flux2_klein():
    # Layers 9, 18 and 27 are what the transformer is conditioned on.
    text_encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LANGUAGE, num_hidden_layers=28))
    return diffusers.Flux2KleinPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        _flux2_vae(),
        _random(text_encoder),
        _qwen_tokenizer(),
        _flux2_transformer(guidance_embeds=False),
    )


def flux2_dev():
    # Layers 10, 20 and 30.
    text = {**LANGUAGE, "num_hidden_layers": 31, "model_type": "mistral", "sliding_window": None}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Mistral3Config(text_config=text, vision_config={**vision, "model_type": "pixtral"})
    tokenizer = _qwen_tokenizer()  # in place of a processor of images as well, which needs torchvision
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][0]['text'][:20] }}{% endfor %}"
    return diffusers.Flux2Pipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        _flux2_vae(),
        _random(transformers.Mistral3ForConditionalGeneration(config)),
        tokenizer,
        _flux2_transformer(),
    )


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[8, 8, 8],
        axes_lens=[1024, 64, 64],
    )
    text_encoder = transformers.Qwen3Model(transformers.Qwen3Config(**LANGUAGE, num_hidden_layers=2))
    return diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        _vae(shift_factor=0.1),
        _random(text_encoder),
        _qwen_tokenizer(),
        _random(transformer),
    )


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,  # the last has no use for its text
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
    )
    return diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        _qwen_vae(),
        _random(transformers.Qwen2_5_VLForConditionalGeneration(_qwen_vl_config())),
        _qwen_tokenizer(),
        _random(transformer),
    )


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        _vae(shift_factor=0.1),
        _t5(),
        _t5_tokenizer(),
        _random(transformer),
    )


def krea2():
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=16,
        text_hidden_dim=8,
        num_text_layers=2,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=8,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    text = {**LANGUAGE, "num_hidden_layers": 2, "rope_parameters": MROPE}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": []})
    return diffusers.Krea2Pipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        _qwen_vae(),
        _random(transformers.Qwen3VLModel(config)),
        _qwen_tokenizer(),
        _random(transformer),
        text_encoder_select_layers=(1, 2),
    )


def pixart_sigma(**kwargs):
    transformer = diffusers.PixArtTransformer2DModel(
        **{**TRANSFORMER, "sample_size": 8, "use_additional_conditions": False, **kwargs},
        out_channels=8,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtSigmaPipeline(_t5_tokenizer(), _t5(), _vae(), _random(transformer), scheduler)


def pixart_alpha():
    # The pipeline knows the further conditions of its largest model by this size of the latents.
    parts = pixart_sigma(sample_size=128, use_additional_conditions=True).components
    return diffusers.PixArtAlphaPipeline(**parts)


def dit():
    transformer = diffusers.DiTTransformer2DModel(
        **TRANSFORMER, out_channels=8, attention_head_dim=8, num_embeds_ada_norm=1000
    )
    return diffusers.DiTPipeline(_random(transformer), _vae(), diffusers.DDIMScheduler())


def wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        text_dim=32,
        freq_dim=8,
        ffn_dim=16,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.WanPipeline(_t5_tokenizer(), _t5(), _random(vae), scheduler, _random(transformer))


PIPELINES = {
    build.__name__: build
    for build in (
        ddpm,
        ddpm_classes,
        ddim,
        stable_diffusion,
        stable_diffusion_xl,
        stable_diffusion_3,
        flux,
        flux2_klein,
        z_image,
        qwen_image,
        chroma,
        flux2_dev,
        krea2,
        *FLOWS,
        pixart_alpha,
        pixart_sigma,
        dit,
    )
}

# Families whose text is long even where all else is tiny: of what goes over all of them, the cheapest runs always.
NEWER = ("flux2_klein", "z_image", "qwen_image", "chroma", "flux2_dev", "krea2", *(build.__name__ for build in FLOWS))
SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in NEWER]
EVERY = [*(name for name in PIPELINES if name not in NEWER), *SLOWLY]
# Layers that see the tokens of all samples in one row, or those that were routed to them: mixed contexts refuse them.
JOINED = {
    "ZImageTransformer2DModel": r"all_x_embedder.*|cap_embedder.*",
    "HiDreamImageTransformer2DModel": r".*\.experts\..*",
}


def usually(names):
    """All of these; slow is one whose pipeline makes text long, whatever is asked of it."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == "hunyuan_image" else name for name in names]


def projection(base):
    """The name of attention's last projection."""
    return "to_out" if type(base.pipe) is diffusers.HiDreamImagePipeline else "to_out.0"


def side(base):
    """Of the smallest images of 16 pixels or more that a base makes."""
    return base.default_resolution if base.fixed_size else -(-16 // base.size_multiple) * base.size_multiple
