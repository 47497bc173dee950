"""Parts of tiny pipelines: random weights, autoencoders of 2 pixels per latent, text encoders and their tokenizers."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

LETTERS = [chr(code) for code in range(33, 127)]


def _random(module: nn.Module) -> Any:
    # Some output and modulation layers start at zero, which would hide every layer before them.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module.eval()


def _vae(kind=diffusers.AutoencoderKL, depth=2, **kwargs):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * depth, "up_block_types": ("UpDecoderBlock2D",) * depth}
    sizes = {"block_out_channels": (8,) * depth, "norm_num_groups": 4, "latent_channels": 4}
    return _random(kind(**blocks, **sizes, **kwargs))


def _flux2_vae():
    vae = _vae(diffusers.AutoencoderKLFlux2)
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 4.0, 16.0)
    return vae


def _qwen_vae():
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 4.0, 2.0, 6.0]}
    blocks: dict[str, Any] = {"dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    return _random(diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, **blocks, **statistics))


def _clip_tokenizer():
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def _clip(projected=False, length=16):
    size = 2 * len(LETTERS)
    config = transformers.CLIPTextConfig(
        vocab_size=size + 2,
        bos_token_id=size,
        eos_token_id=size + 1,
        max_position_embeddings=length,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return _random(kind(config))


def _t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in string.ascii_letters)]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


def _t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return _random(transformers.T5EncoderModel(transformers.T5Config(**sizes)))


def _qwen_tokenizer():
    """Characters are its tokens."""
    tokenizer = transformers.Qwen2Tokenizer(vocab={word: i for i, word in enumerate([*LETTERS, "Ġ", "Ċ"])}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }};{% endfor %}"
    return tokenizer


# Of the language models that newer pipelines take for text encoders.
LANGUAGE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def _qwen_vl_config(num_hidden_layers=2):
    text = {**LANGUAGE, "num_hidden_layers": num_hidden_layers, "rope_parameters": MROPE}
    text |= {"bos_token_id": None, "eos_token_id": None}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
