"""Tiny, randomly initialized diffusers and transformers models, each with inputs for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

IMAGE_TOKEN = 63
UNET: dict[str, Any] = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8}
TRANSFORMER: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 2, "in_channels": 4, "out_channels": 4}
CLIP: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {**CLIP, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}


@dataclass(frozen=True)
class Architecture:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    output: Callable[[Any], Tensor]


def _architecture(
    name: str, create: Callable[[], nn.Module], draw: Callable[[int], dict[str, Any]], output: str
) -> Architecture:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = create()
        # Some output and modulation layers start at zero, which would hide every layer before them.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    def inputs(rows: int) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return draw(rows)

    return Architecture(name, build, inputs, lambda result: getattr(result, output))


def _timesteps(rows: int) -> Tensor:
    return torch.randint(1, 1000, (rows,))


def _unet2d() -> nn.Module:
    return diffusers.UNet2DModel(
        **UNET,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _unet2d_inputs(rows: int) -> dict[str, Any]:
    return {"sample": torch.randn(rows, 3, 8, 8), "timestep": _timesteps(rows)}


def _unet2d_condition() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **UNET,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )


def _unet2d_condition_inputs(rows: int) -> dict[str, Any]:
    text = torch.randn(rows, 5, 16)
    return {"sample": torch.randn(rows, 4, 8, 8), "timestep": _timesteps(rows), "encoder_hidden_states": text}


def _sdxl_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **UNET,
        block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16,
        attention_head_dim=(2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def _sdxl_unet_inputs(rows: int) -> dict[str, Any]:
    added = {"text_embeds": torch.randn(rows, 16), "time_ids": torch.randint(0, 64, (rows, 6)).float()}
    return {**_unet2d_condition_inputs(rows), "added_cond_kwargs": added}


def _dit() -> nn.Module:
    model = diffusers.DiTTransformer2DModel(**TRANSFORMER, attention_head_dim=8, sample_size=8, num_embeds_ada_norm=10)
    # The label dropout of 0.1 is no argument of the model.
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def _dit_inputs(rows: int) -> dict[str, Any]:
    labels = torch.randint(0, 10, (rows,))
    return {"hidden_states": torch.randn(rows, 4, 8, 8), "timestep": _timesteps(rows), "class_labels": labels}


def _transformer_inputs(rows: int, *shape: int) -> dict[str, Any]:
    text = torch.randn(rows, 5, 16)
    return {"hidden_states": torch.randn(rows, *shape), "encoder_hidden_states": text, "timestep": _timesteps(rows)}


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        **TRANSFORMER,
        attention_head_dim=12,
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=True,
    )


def _pixart_inputs(rows: int) -> dict[str, Any]:
    added = {"resolution": 64 * torch.rand(rows, 2), "aspect_ratio": torch.rand(rows, 1)}
    return {**_transformer_inputs(rows, 4, 8, 8), "added_cond_kwargs": added}


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        **TRANSFORMER,
        attention_head_dim=8,
        sample_size=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _sd3_inputs(rows: int) -> dict[str, Any]:
    return {**_transformer_inputs(rows, 4, 8, 8), "pooled_projections": torch.randn(rows, 16)}


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        **TRANSFORMER,
        num_single_layers=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def _flux_inputs(rows: int) -> dict[str, Any]:
    return {
        **_transformer_inputs(rows, 16, 4),
        "timestep": torch.rand(rows),
        "pooled_projections": torch.randn(rows, 16),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }


def _wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(**TRANSFORMER, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32)


def _cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        **TRANSFORMER,
        attention_head_dim=16,
        time_embed_dim=16,
        text_embed_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
    )


def _svd_unet() -> nn.Module:
    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2,),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
    )
    # The fixed 32 groups would hold one channel each, and so remove the time embedding.
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 8
    return model


def _svd_unet_inputs(rows: int) -> dict[str, Any]:
    # With the usual single token, no query or key of the cross-attention would matter.
    condition = {"encoder_hidden_states": torch.randn(rows, 2, 16), "added_time_ids": 10 * torch.rand(rows, 3)}
    return {"sample": torch.randn(rows, 2, 8, 8, 8), "timestep": _timesteps(rows), **condition}


def _autoencoder_kl() -> nn.Module:
    return diffusers.AutoencoderKL(
        **UNET,
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    )


def _gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    other: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **other, bos_token_id=62, eos_token_id=62))


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def _qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA))


def _tokens(rows: int) -> dict[str, Any]:
    # Ids from 3 to 61 keep clear of the padding, begin, end and image tokens.
    return {"input_ids": torch.randint(3, 62, (rows, 6))}


def _t5() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, dropout_rate=0.0))


def _t5_inputs(rows: int) -> dict[str, Any]:
    return {**_tokens(rows), "decoder_input_ids": torch.randint(3, 62, (rows, 4))}


def _llava() -> nn.Module:
    # The usual penultimate vision layer would leave the last one unused.
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _llava_inputs(rows: int) -> dict[str, Any]:
    ids = torch.cat([torch.full((rows, 4), IMAGE_TOKEN), _tokens(rows)["input_ids"]], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 8, 8)}


def _clip_text() -> nn.Module:
    tokens: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP, **tokens, max_position_embeddings=16))


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _architecture("unet2d", _unet2d, _unet2d_inputs, "sample"),
        _architecture("unet2d_condition", _unet2d_condition, _unet2d_condition_inputs, "sample"),
        _architecture("sdxl_unet", _sdxl_unet, _sdxl_unet_inputs, "sample"),
        _architecture("dit", _dit, _dit_inputs, "sample"),
        _architecture("pixart", _pixart, _pixart_inputs, "sample"),
        _architecture("sd3", _sd3, _sd3_inputs, "sample"),
        _architecture("flux", _flux, _flux_inputs, "sample"),
        _architecture("wan", _wan, lambda rows: _transformer_inputs(rows, 4, 2, 8, 8), "sample"),
        _architecture("cogvideox", _cogvideox, lambda rows: _transformer_inputs(rows, 2, 4, 8, 8), "sample"),
        _architecture("svd_unet", _svd_unet, _svd_unet_inputs, "sample"),
        _architecture("autoencoder_kl", _autoencoder_kl, lambda rows: {"sample": torch.randn(rows, 3, 8, 8)}, "sample"),
        _architecture("gpt2", _gpt2, _tokens, "logits"),
        _architecture("llama", _llama, _tokens, "logits"),
        _architecture("qwen3", _qwen3, _tokens, "logits"),
        _architecture("t5", _t5, _t5_inputs, "logits"),
        _architecture("llava", _llava, _llava_inputs, "logits"),
        _architecture("clip_text", _clip_text, _tokens, "last_hidden_state"),
    )
}
