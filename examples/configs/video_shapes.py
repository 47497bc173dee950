"""The published shapes of bases of videos, as pipelines without weights.

Where nothing else is said, a denoiser or an autoencoder is what its class in diffusers builds by default.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers

from .parts import Shape, captions, clip_l, llama_3_8b, pipeline, t5_xxl, umt5

_WAN_SMALL: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_COGVIDEOX_5B: dict[str, Any] = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
_WAN_TEXT = captions(encoder_hidden_states=(512, 4096))


VIDEOS = {
    "wan21-1.3b": Shape(
        "Wan 2.1 1.3B",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        pipeline(
            "WanPipeline",
            parts={
                "transformer": lambda: diffusers.WanTransformer3DModel(**_WAN_SMALL),
                "vae": diffusers.AutoencoderKLWan,
                "text_encoder": umt5,
            },
        ),
        _WAN_TEXT,
        "diffusers' scripts/convert_wan_to_diffusers.py, UMT5's configuration",
    ),
    "wan22-a14b": Shape(
        "Wan 2.2 A14B",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        pipeline(
            "WanPipeline",
            parts={
                "transformer": diffusers.WanTransformer3DModel,
                "transformer_2": diffusers.WanTransformer3DModel,
                "vae": diffusers.AutoencoderKLWan,
                "text_encoder": umt5,
            },
            boundary_ratio=0.875,
        ),
        _WAN_TEXT,
        "diffusers' scripts/convert_wan_to_diffusers.py, UMT5's configuration",
        "Once more with --noise_expert low and another --output_dir: details are the other denoiser's.",
    ),
    "ltx": Shape(
        "LTX-Video 2B",
        "Lightricks/LTX-Video",
        pipeline(
            "LTXPipeline",
            parts={
                "transformer": diffusers.LTXVideoTransformer3DModel,
                "vae": diffusers.AutoencoderKLLTXVideo,
                "text_encoder": t5_xxl,
            },
        ),
        captions(encoder_hidden_states=(128, 4096), encoder_attention_mask=128),
        "diffusers' defaults",
    ),
    "cogvideox-5b": Shape(
        "CogVideoX 5B",
        "zai-org/CogVideoX-5b",
        pipeline(
            "CogVideoXPipeline",
            "CogVideoXDPMScheduler",
            parts={
                "transformer": lambda: diffusers.CogVideoXTransformer3DModel(**_COGVIDEOX_5B),
                "vae": diffusers.AutoencoderKLCogVideoX,
                "text_encoder": t5_xxl,
            },
        ),
        captions(encoder_hidden_states=(226, 4096)),
        "diffusers' scripts/convert_cogvideox_to_diffusers.py",
    ),
    "hunyuan-video": Shape(
        "HunyuanVideo",
        "hunyuanvideo-community/HunyuanVideo",
        pipeline(
            "HunyuanVideoPipeline",
            parts={
                "transformer": diffusers.HunyuanVideoTransformer3DModel,
                "vae": diffusers.AutoencoderKLHunyuanVideo,
                "text_encoder": partial(llama_3_8b, vocab_size=128320),
                "text_encoder_2": clip_l,
            },
        ),
        captions(encoder_hidden_states=(256, 4096), pooled_projections=(768,), encoder_attention_mask=256),
        "diffusers' defaults, Llama 3's configuration",
    ),
    "mochi": Shape(
        "Mochi 1",
        "genmo/mochi-1-preview",
        pipeline(
            "MochiPipeline",
            parts={
                "transformer": diffusers.MochiTransformer3DModel,
                "vae": diffusers.AutoencoderKLMochi,
                "text_encoder": t5_xxl,
            },
        ),
        captions(encoder_hidden_states=(256, 4096), encoder_attention_mask=256),
        "diffusers' defaults",
    ),
}
