"""Tiny networks of diffusers and the same in ComfyUI: the same weights, and calls that take the same inputs."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from torch import Tensor, nn

from ..training.tiny_parts import _random

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = [
    *ATTENTION, "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "conv_in", "conv_out", "linear_1", "linear_2",
]  # fmt: skip
SIDE = 8
UNET = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "sample_size": SIDE,
}
COMFY_UNET = {
    "image_size": SIDE,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2] * 3,
    "channel_mult": [1, 1, 2],
    "transformer_depth": [1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 6 + [0] * 3,
    "use_spatial_transformer": True,
    "context_dim": 16,
    "legacy": False,
    "use_temporal_attention": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}


def load_comfyui() -> SimpleNamespace:
    """Return modules of the checkout of ComfyUI that COMFYUI_PATH names, and skip the test where it names none."""
    if not (path := os.environ.get("COMFYUI_PATH")):
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI (examples/comfyui/README.md)")
    if path not in sys.path:
        sys.path.append(path)  # behind: it has a folder `tests`, too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli_args: Any = __import__("comfy.cli_args").cli_args
        cli_args.args.cpu = True  # before anything looks for a GPU
        comfy: Any = __import__("comfy.sd")
        return SimpleNamespace(comfy=comfy, nodes=__import__("nodes"), execution=__import__("execution"))


@dataclass
class Pair:
    """One network twice.

    Attributes:
        theirs: of diffusers.
        model: ComfyUI's.
        inputs: of one row.
        call: of diffusers, with inputs of any number of rows.
        comfy_call: of ComfyUI.
        targets: what to adapt.
    """

    theirs: nn.Module
    model: Any
    inputs: dict[str, Tensor]
    call: Callable[..., Tensor]
    comfy_call: Callable[..., Tensor]
    targets: list[str]


def build(name: str) -> Pair:
    """Return the networks of a family; random weights are those of the family each time."""
    comfy = load_comfyui().comfy
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FAMILIES[name](comfy)


def _model(config, theirs, settings, table):
    """Return ComfyUI's network with the weights of diffusers'.

    Its tables say where they go: name in diffusers -> name, or (name, offset[, function]).
    """
    config = config({**settings, "dtype": torch.float32})
    if "context_dim" in settings:
        config.unet_config |= {"num_heads": 2, "num_head_channels": -1}
    model = config.get_model({})
    places = table(config.unet_config)
    state = model.state_dict()
    for name, weight in theirs.state_dict().items():
        place = places[name]
        own, offset, function = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        part = state[f"diffusion_model.{own}"]
        part = part if offset is None else part.narrow(*offset)
        part.copy_((weight if function is None else function(weight)).view_as(part))
    return model


def sd15(comfy):
    unet = _random(diffusers.UNet2DConditionModel(**UNET))
    model = _model(comfy.supported_models.SD15, unet, COMFY_UNET, comfy.utils.unet_to_diffusers)
    return Pair(
        unet,
        model,
        {"x": torch.randn(1, 4, SIDE, SIDE), "t": torch.tensor([300.0]), "c": torch.randn(1, 3, 16)},
        lambda x, t, c: unet(x, t, c).sample,
        lambda x, t, c: model.diffusion_model(x, t, context=c),
        CONVOLUTIONS,
    )


def sdxl(comfy):
    unet = _random(
        diffusers.UNet2DConditionModel(
            **UNET,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )
    )
    settings = COMFY_UNET | {"use_linear_in_transformer": True, "adm_in_channels": 64, "num_classes": "sequential"}
    model = _model(comfy.supported_models.SDXL, unet, settings, comfy.utils.unet_to_diffusers)
    size = torch.tensor([[64.0, 64, 0, 0, 64, 64]])

    def comfy_call(x, t, c, pooled):
        ids = comfy.ldm.modules.diffusionmodules.util.timestep_embedding(size.flatten(), 8).flatten()[None]
        return model.diffusion_model(x, t, context=c, y=torch.cat([pooled, ids.expand(len(x), -1)], 1))

    return Pair(
        unet,
        model,
        {
            "x": torch.randn(1, 4, SIDE, SIDE),
            "t": torch.tensor([300.0]),
            "c": torch.randn(1, 3, 16),
            "pooled": torch.randn(1, 16),
        },
        lambda x, t, c, pooled: (
            unet(x, t, c, added_cond_kwargs={"text_embeds": pooled, "time_ids": size.expand(len(x), -1)}).sample
        ),
        comfy_call,
        CONVOLUTIONS,
    )


def sd3(comfy):
    transformer = _random(
        diffusers.SD3Transformer2DModel(
            sample_size=SIDE,
            in_channels=4,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=128,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=SIDE,
        )
    )
    settings = {
        "input_size": None,
        "in_channels": 4,
        "depth": 2,
        "adm_in_channels": 8,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 16, "out_features": 128},
        },
        "pos_embed_max_size": SIDE,
        "num_patches": SIDE * SIDE,
    }
    model = _model(comfy.supported_models.SD3, transformer, settings, comfy.utils.mmdit_to_diffusers)
    return Pair(
        transformer,
        model,
        {
            "x": torch.randn(1, 4, SIDE, SIDE),
            "t": torch.tensor([300.0]),
            "c": torch.randn(1, 3, 16),
            "y": torch.randn(1, 8),
        },
        lambda x, t, c, y: (
            transformer(hidden_states=x, encoder_hidden_states=c, pooled_projections=y, timestep=t).sample
        ),
        lambda x, t, c, y: model.diffusion_model(x, t, context=c, y=y),
        # The last's function exchanges the halves of a weight.
        [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "ff.net.2", "norm1.linear", "norm_out.linear"],
    )


def flux(comfy):
    transformer = _random(
        diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "vec_in_dim": 8,
        "context_in_dim": 8,
        "hidden_size": 32,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    }
    model = _model(comfy.supported_models.Flux, transformer, settings, comfy.utils.flux_to_diffusers)
    pipeline: Any = diffusers.FluxPipeline

    def call(x, t, c, y, guidance):
        packed = pipeline._pack_latents(x, len(x), 4, SIDE, SIDE)
        output = transformer(
            hidden_states=packed,
            encoder_hidden_states=c,
            pooled_projections=y,
            timestep=t,
            guidance=guidance,
            img_ids=pipeline._prepare_latent_image_ids(len(x), SIDE // 2, SIDE // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(c.shape[1], 3),
        ).sample
        return pipeline._unpack_latents(output, 8 * SIDE, 8 * SIDE, 8)

    return Pair(
        transformer,
        model,
        {
            "x": torch.randn(1, 4, SIDE, SIDE),
            "t": torch.tensor([0.3]),
            "c": torch.randn(1, 3, 8),
            "y": torch.randn(1, 8),
            "guidance": torch.tensor([3.0]),
        },
        call,
        lambda x, t, c, y, guidance: model.diffusion_model(x, t, context=c, y=y, guidance=guidance),
        [*ATTENTION, "add_q_proj", "to_add_out", "proj_mlp", "proj_out", "ff.net.0.proj", "norm_out.linear"],
    )


def qwen_image(comfy):
    sizes = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    }
    transformer = _random(diffusers.QwenImageTransformer2DModel(**sizes))
    same = {name: name for name in transformer.state_dict()}
    model = _model(comfy.supported_models.QwenImage, transformer, sizes, lambda _: same)
    pipeline: Any = diffusers.QwenImagePipeline

    def call(x, t, c):
        output = transformer(
            hidden_states=pipeline._pack_latents(x.transpose(1, 2), len(x), 4, SIDE, SIDE),
            encoder_hidden_states=c,
            encoder_hidden_states_mask=torch.ones(c.shape[:2], dtype=torch.long),
            timestep=t,
            img_shapes=[[(1, SIDE // 2, SIDE // 2)]] * len(x),
        ).sample
        return pipeline._unpack_latents(output, 8 * SIDE, 8 * SIDE, 8)

    return Pair(
        transformer,
        model,
        {"x": torch.randn(1, 4, 1, SIDE, SIDE), "t": torch.tensor([0.3]), "c": torch.randn(1, 3, 8)},
        call,
        lambda x, t, c: model.diffusion_model(x, t, context=c),
        [*ATTENTION, "add_q_proj", "add_v_proj", "to_add_out", "img_mlp.net.2"],
    )


def z_image(comfy):
    sizes = {
        "in_channels": 4,
        "dim": 256,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 8,
        "n_kv_heads": 8,
        "cap_feat_dim": 8,
        "axes_dims": [8, 12, 12],
        "axes_lens": [1024, 64, 64],
    }
    transformer = diffusers.ZImageTransformer2DModel(**sizes)
    transformer.t_embedder = TimestepEmbedder(256, 256)  # in ComfyUI its width follows from `dim`
    _random(transformer)
    settings = sizes | {
        "multiple_of": 2,
        "ffn_dim_multiplier": 8 / 3,
        "qk_norm": True,
        "rope_theta": 256.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }
    model = _model(comfy.supported_models.ZImage, transformer, settings, comfy.utils.z_image_to_diffusers)

    def call(x, t, c):
        return torch.stack(transformer(list(x.unsqueeze(2)), 1 - t, list(c), return_dict=False)[0]).squeeze(2)

    return Pair(
        transformer,
        model,
        {"x": torch.randn(1, 4, SIDE, SIDE), "t": torch.tensor([0.3]), "c": torch.randn(1, 32, 8)},
        call,
        lambda x, t, c: -model.diffusion_model(x, t, context=c, num_tokens=c.shape[1]),
        [*ATTENTION, "w1", "w2", "w3", "mlp.2", "layers.1.adaLN_modulation.0"],
    )


def wan(comfy):
    transformer = _random(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
        )
    )
    settings = {
        "model_type": "t2v",
        "in_dim": 4,
        "dim": 48,
        "ffn_dim": 32,
        "freq_dim": 16,
        "text_dim": 8,
        "out_dim": 4,
        "num_heads": 2,
        "num_layers": 2,
    }
    # ComfyUI has no table for it.
    names = {
        r"^proj_out\.": "head.head.",
        r"^scale_shift_table$": "head.modulation",
        "scale_shift_table": "modulation",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_out.0": "o",
        r"to_([qkv])\.": r"\1.",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "norm2": "norm3",
    }
    table = {}
    for name in transformer.state_dict():
        table[name] = name
        for theirs, own in names.items():
            table[name] = re.sub(theirs, own, table[name])
    model = _model(comfy.supported_models.WAN21_T2V, transformer, settings, lambda _: table)
    return Pair(
        transformer,
        model,
        {"x": torch.randn(1, 4, 3, SIDE, SIDE), "t": torch.tensor([300.0]), "c": torch.randn(1, 5, 8)},
        lambda x, t, c: transformer(x, t, c).sample,
        lambda x, t, c: model.diffusion_model(x, t, context=c),
        [*ATTENTION, "ffn.net.0.proj", "ffn.net.2", "time_proj", "linear_1", "proj_out", "patch_embedding"],
    )


FAMILIES: dict[str, Callable[[Any], Pair]] = {
    build.__name__: build for build in (sd15, sdxl, sd3, flux, qwen_image, z_image, wan)
}
