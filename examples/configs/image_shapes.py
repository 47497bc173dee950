"""The published shapes of bases of images, as pipelines without weights.

Where nothing else is said, a denoiser or an autoencoder is what its class in diffusers builds by default.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers

from .parts import (
    Shape,
    byt5,
    captions,
    clip_g,
    clip_l,
    clip_l_projected,
    gemma_2_2b,
    glm_4_9b,
    llama_3_8b,
    mistral_small,
    pipeline,
    qwen_3_4b,
    qwen_3_8b,
    qwen_3_vl_4b,
    qwen_25_vl_7b,
    t5_xxl,
    umt5,
    vae,
)

# Tokens of a caption, where the pipeline does not pad captions to one length.
CAPTION_TOKENS = 512

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
_SD35_LARGE: dict[str, Any] = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
_SD35_LARGE |= {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
_SD35_MEDIUM: dict[str, Any] = _SD35_LARGE | {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384}
_SD35_MEDIUM |= {"caption_projection_dim": 1536, "dual_attention_layers": (*range(13),)}
_KLEIN_4B: dict[str, Any] = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
_KLEIN_4B |= {"joint_attention_dim": 7680, "guidance_embeds": False}
_KLEIN_9B: dict[str, Any] = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
_KLEIN_9B |= {"joint_attention_dim": 12288, "guidance_embeds": False}
_HIDREAM: dict[str, Any] = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": (4096, 4096)}
_HIDREAM |= {"axes_dims_rope": (64, 32, 32), "llama_layers": (*range(32), *[31] * 16)}
_COGVIEW_VAE: dict[str, Any] = {"block_out_channels": (128, 512, 1024, 1024), "layers_per_block": 3}
_COGVIEW_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
_DC_BLOCKS: Any = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_HUNYUAN_VAE: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": 64, "layers_per_block": 2}
_HUNYUAN_VAE |= {"block_out_channels": (128, 256, 512, 512, 1024, 1024), "spatial_compression_ratio": 32}
_HUNYUAN_VAE |= {"sample_size": 384, "scaling_factor": 0.75289}
_NOT_CHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _sd35(size: str, sizes: dict[str, Any]) -> Shape:
    return Shape(
        f"Stable Diffusion 3.5 {size}",
        f"stabilityai/stable-diffusion-3.5-{size}",
        pipeline(
            "StableDiffusion3Pipeline",
            parts={
                "transformer": lambda: diffusers.SD3Transformer2DModel(**sizes),
                "vae": lambda: vae(16, use_quant_conv=False, use_post_quant_conv=False),
                "text_encoder": clip_l_projected,
                "text_encoder_2": clip_g,
                "text_encoder_3": t5_xxl,
            },
        ),
        captions(encoder_hidden_states=(77 + 256, 4096), pooled_projections=(2048,)),
        "diffusers' scripts/convert_sd3_to_diffusers.py",
    )


def _klein(size: str, sizes: dict[str, Any], encoder: Any) -> Shape:
    return Shape(
        f"FLUX.2 klein {size}",
        f"black-forest-labs/FLUX.2-klein-base-{size}",
        pipeline(
            "Flux2KleinPipeline",
            parts={
                "transformer": lambda: diffusers.Flux2Transformer2DModel(**sizes),
                "vae": diffusers.AutoencoderKLFlux2,
                "text_encoder": encoder,
            },
        ),
        captions(encoder_hidden_states=(512, sizes["joint_attention_dim"])),
        "diffusers' scripts/convert_flux2_to_diffusers.py, Qwen3's configuration",
    )


IMAGES = {
    "sd15": Shape(
        "Stable Diffusion 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline(
            "StableDiffusionPipeline",
            "DDPMScheduler",
            parts={
                "unet": lambda: diffusers.UNet2DConditionModel(**_UNET_SD),
                "vae": lambda: vae(4),
                "text_encoder": clip_l,
            },
            **_NOT_CHECKED,
        ),
        captions(encoder_hidden_states=(77, 768)),
        "the base's config.json",
    ),
    "sdxl": Shape(
        "Stable Diffusion XL",
        "stabilityai/stable-diffusion-xl-base-1.0",
        pipeline(
            "StableDiffusionXLPipeline",
            "DDPMScheduler",
            parts={
                "unet": lambda: diffusers.UNet2DConditionModel(**_UNET_XL),
                "vae": lambda: vae(4),
                "text_encoder": clip_l,
                "text_encoder_2": clip_g,
            },
        ),
        captions(encoder_hidden_states=(77, 2048), text_embeds=(1280,)),
        "the base's config.json",
    ),
    "sd35-medium": _sd35("medium", _SD35_MEDIUM),
    "sd35-large": _sd35("large", _SD35_LARGE),
    "pixart-sigma": Shape(
        "PixArt-Sigma",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        pipeline(
            "PixArtSigmaPipeline",
            "DDPMScheduler",
            parts={
                "transformer": lambda: diffusers.PixArtTransformer2DModel(
                    caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
                ),
                "vae": lambda: vae(4),
                "text_encoder": t5_xxl,
            },
        ),
        captions(encoder_hidden_states=(300, 4096), encoder_attention_mask=300),
        "diffusers' scripts/convert_pixart_sigma_to_diffusers.py",
    ),
    "flux1-dev": Shape(
        "FLUX.1 dev",
        "black-forest-labs/FLUX.1-dev",
        pipeline(
            "FluxPipeline",
            parts={
                "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
                "vae": lambda: vae(16),
                "text_encoder": clip_l,
                "text_encoder_2": t5_xxl,
            },
        ),
        captions(encoder_hidden_states=(512, 4096), pooled_projections=(768,)),
        "diffusers' defaults",
    ),
    "flux2-klein-4b": _klein("4B", _KLEIN_4B, partial(qwen_3_4b, causal=True)),
    "flux2-klein-9b": _klein("9B", _KLEIN_9B, qwen_3_8b),
    "flux2-dev": Shape(
        "FLUX.2 dev",
        "black-forest-labs/FLUX.2-dev",
        pipeline(
            "Flux2Pipeline",
            parts={
                "transformer": diffusers.Flux2Transformer2DModel,
                "vae": diffusers.AutoencoderKLFlux2,
                "text_encoder": mistral_small,
            },
        ),
        captions(encoder_hidden_states=(512, 15360)),
        "diffusers' scripts/convert_flux2_to_diffusers.py, the configuration of Mistral Small 3.2",
    ),
    "chroma": Shape(
        "Chroma",
        "lodestones/Chroma1-HD",
        pipeline(
            "ChromaPipeline",
            parts={
                "transformer": diffusers.ChromaTransformer2DModel,
                "vae": lambda: vae(16),
                "text_encoder": t5_xxl,
            },
        ),
        captions(encoder_hidden_states=(512, 4096), attention_mask=512),
        "diffusers' defaults",
    ),
    "qwen-image": Shape(
        "Qwen-Image",
        "Qwen/Qwen-Image",
        pipeline(
            "QwenImagePipeline",
            parts={
                "transformer": diffusers.QwenImageTransformer2DModel,
                "vae": diffusers.AutoencoderKLQwenImage,
                "text_encoder": qwen_25_vl_7b,
            },
        ),
        captions(encoder_hidden_states=(CAPTION_TOKENS, 3584), encoder_hidden_states_mask=CAPTION_TOKENS),
        "diffusers' defaults, Qwen2.5-VL's configuration",
    ),
    "krea2": Shape(
        "Krea 2",
        "krea/Krea-2-Raw",
        pipeline(
            "Krea2Pipeline",
            parts={
                "transformer": diffusers.Krea2Transformer2DModel,
                "vae": diffusers.AutoencoderKLQwenImage,
                "text_encoder": qwen_3_vl_4b,
            },
        ),
        captions(encoder_hidden_states=(512, 12, 2560), encoder_attention_mask=512),
        "diffusers' defaults, Qwen3-VL's configuration",
    ),
    "z-image": Shape(
        "Z-Image",
        "Tongyi-MAI/Z-Image",
        pipeline(
            "ZImagePipeline",
            parts={
                "transformer": diffusers.ZImageTransformer2DModel,
                "vae": lambda: vae(16),
                "text_encoder": qwen_3_4b,
            },
        ),
        captions(text=(CAPTION_TOKENS, 2560), mask=CAPTION_TOKENS),
        "diffusers' defaults, Qwen3's configuration",
    ),
    "sana": Shape(
        "Sana",
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        pipeline(
            "SanaPipeline",
            parts={
                "transformer": diffusers.SanaTransformer2DModel,
                "vae": lambda: diffusers.AutoencoderDC(
                    encoder_block_types=_DC_BLOCKS,
                    decoder_block_types=_DC_BLOCKS,
                    downsample_block_type="conv",
                    upsample_block_type="interpolate",
                    scaling_factor=0.41407,
                ),
                "text_encoder": gemma_2_2b,
            },
        ),
        captions(encoder_hidden_states=(300, 2304), encoder_attention_mask=300),
        "diffusers' scripts/convert_sana_to_diffusers.py and convert_dcae_to_diffusers.py",
    ),
    "lumina2": Shape(
        "Lumina Image 2.0",
        "Alpha-VLLM/Lumina-Image-2.0",
        pipeline(
            "Lumina2Pipeline",
            parts={
                "transformer": lambda: diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304),
                "vae": lambda: vae(16),
                "text_encoder": gemma_2_2b,
            },
        ),
        captions(encoder_hidden_states=(256, 2304), encoder_attention_mask=256),
        "diffusers' defaults, Gemma 2's configuration",
    ),
    "auraflow": Shape(
        "AuraFlow 0.3",
        "fal/AuraFlow-v0.3",
        pipeline(
            "AuraFlowPipeline",
            parts={
                "transformer": diffusers.AuraFlowTransformer2DModel,
                "vae": lambda: vae(4),
                "text_encoder": lambda: umt5(d_model=2048, d_ff=5120, num_heads=32, vocab_size=32128),
            },
        ),
        captions(encoder_hidden_states=(256, 2048)),
        "diffusers' defaults, the configuration of Pile-T5 XL",
    ),
    "hidream": Shape(
        "HiDream-I1",
        "HiDream-ai/HiDream-I1-Full",
        pipeline(
            "HiDreamImagePipeline",
            parts={
                "transformer": lambda: diffusers.HiDreamImageTransformer2DModel(**_HIDREAM),
                "vae": lambda: vae(16),
                "text_encoder": clip_l_projected,
                "text_encoder_2": clip_g,
                "text_encoder_3": t5_xxl,
                "text_encoder_4": partial(llama_3_8b, causal=True),
            },
        ),
        captions(
            encoder_hidden_states_t5=(128, 4096),
            encoder_hidden_states_llama3=(32, 128, 4096),
            pooled_embeds=(2048,),
        ),
        "diffusers' defaults, HiDream's configuration as ComfyUI has it",
        "The repository lacks Llama 3.1 8B: save a pipeline with it in a folder first, and name that as the base.",
    ),
    "cogview4": Shape(
        "CogView4",
        "zai-org/CogView4-6B",
        pipeline(
            "CogView4Pipeline",
            parts={
                "transformer": lambda: diffusers.CogView4Transformer2DModel(
                    num_layers=28, attention_head_dim=128, num_attention_heads=32
                ),
                "vae": lambda: vae(16, **_COGVIEW_VAE),
                "text_encoder": glm_4_9b,
            },
        ),
        captions(encoder_hidden_states=(CAPTION_TOKENS, 4096), text_attn_mask=CAPTION_TOKENS),
        "diffusers' scripts/convert_cogview4_to_diffusers.py, GLM-4's configuration",
    ),
    "hunyuan-image": Shape(
        "HunyuanImage 2.1",
        "hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
        pipeline(
            "HunyuanImagePipeline",
            parts={
                "transformer": lambda: diffusers.HunyuanImageTransformer2DModel(text_embed_2_dim=1472),
                "vae": lambda: diffusers.AutoencoderKLHunyuanImage(**_HUNYUAN_VAE),
                "text_encoder": qwen_25_vl_7b,
                "text_encoder_2": byt5,
            },
        ),
        captions(
            encoder_hidden_states=(1000, 3584),
            encoder_attention_mask=1000,
            encoder_hidden_states_2=(128, 1472),
            encoder_attention_mask_2=128,
        ),
        "diffusers' scripts/convert_hunyuan_image_to_diffusers.py, ByT5's configuration as ComfyUI has it",
    ),
}
