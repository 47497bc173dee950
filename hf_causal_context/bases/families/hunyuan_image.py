"""HunyuanImage 2.1."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..diffusion_base import DiffusionBase


class HunyuanImage(DiffusionBase):
    """HunyuanImage: Qwen2.5-VL, and ByT5 for quoted text; how it is guided is a part of the pipeline."""

    takes_guidance = False
    passes_sigmas = True
    image_stream: ClassVar[int] = 0

    @property
    def size_multiple(self) -> int:
        return self._vae_scale * max(self._config.patch_size)

    @property
    def default_resolution(self) -> int:
        return self.pipe.default_sample_size * self._vae_scale

    def enable_gradient_checkpointing(self) -> None:
        # The model names arguments of its blocks, for which diffusers' own function has no place.
        self.pipe.transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, mask, glyphs, glyph_mask = self.pipe.encode_prompt(
            captions, self.pipe.text_encoder.device, batch_size=len(captions)
        )
        return {
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": glyphs.to(hidden.dtype),
            "encoder_attention_mask_2": glyph_mask,
        }

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        times = timesteps.to(noisy.dtype)
        # Data are predicted without amplified guidance; 1 is no amplification.
        guidance = torch.full_like(times, 1000) if self._config.guidance_embeds else None
        # A mean velocity up to the same time is the velocity.
        end = times if self._config.use_meanflow else None
        return {**super()._arguments(noisy, times, conditions), "guidance": guidance, "timestep_r": end}
