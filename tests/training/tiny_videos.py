"""Tiny pipelines of videos, with random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from .tiny_flows import _glm_tokenizer
from .tiny_parts import LANGUAGE, _clip, _clip_tokenizer, _random, _t5, _t5_tokenizer
from .tiny_pipelines import wan

SIZE = 32  # of clips that all of them take


def wan_2_2():
    """Two denoisers, the scheduler of the published weights, and a boundary between the two."""
    pipe, second = wan(), wan()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts = {**pipe.components, "scheduler": scheduler, "transformer_2": second.transformer}
    return diffusers.WanPipeline(**parts, boundary_ratio=0.875)


def wan_2_2_small():
    """One denoiser that takes a time for each patch."""
    return diffusers.WanPipeline(**wan().components, expand_timesteps=True)


def ltx(**kwargs):
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        scaling_factor=0.5,
        **kwargs,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return diffusers.LTXPipeline(scheduler, _random(vae), _t5(), _t5_tokenizer(), _random(transformer))


def cogvideox(**kwargs):
    settings: dict[str, Any] = {
        "sample_height": 4,
        "sample_width": 4,
        "sample_frames": 9,
        "patch_size": 2,
        "text_embed_dim": 32,
    }
    settings |= {"use_rotary_positional_embeddings": True, "max_text_seq_length": 226, "time_embed_dim": 8}
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, **settings | kwargs
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.CogVideoXDPMScheduler(
        beta_start=0.00085,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )
    return diffusers.CogVideoXPipeline(_t5_tokenizer(), _t5(), _random(vae), _random(transformer), scheduler)


def cogvideox_1_5():
    """Patches of two frames of latents."""
    return cogvideox(patch_size_t=2, patch_bias=False, use_learned_positional_embeddings=False)


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        guidance_embeds=True,
        text_embed_dim=8,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    llama = transformers.LlamaModel(transformers.LlamaConfig(**LANGUAGE, num_hidden_layers=4, pad_token_id=0))
    tokenizer = _glm_tokenizer()
    tokenizer.padding_side = "right"
    return diffusers.HunyuanVideoPipeline(
        _random(llama),
        tokenizer,
        _random(transformer),
        _random(vae),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        _clip(length=77),
        _clip_tokenizer(),
    )


def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,  # the last has no use for its text
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(scheduler, _random(vae), _t5(), _t5_tokenizer(), _random(transformer))


VIDEOS = {
    build.__name__: build
    for build in (wan, wan_2_2, wan_2_2_small, ltx, cogvideox, cogvideox_1_5, hunyuan_video, mochi)
}


def frames_of(name):
    """Return how many frames of a clip a pipeline takes."""
    return 7 if name == "mochi" else 9
