"""Tiny pipelines of newer flow transformers, with random weights; some make images of 32 pixels at least."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from .tiny_parts import LANGUAGE, LETTERS, _random


def _gemma_tokenizer():
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def _gemma():
    return _random(transformers.Gemma2Model(transformers.Gemma2Config(**LANGUAGE, num_hidden_layers=2)))


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


FLOWS = (sana,)
