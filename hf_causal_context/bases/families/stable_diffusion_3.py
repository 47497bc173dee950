"""Stable Diffusion 3."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion_base import DiffusionBase


class StableDiffusion3(DiffusionBase):
    """Stable Diffusion 3: two CLIP encoders and T5, flow matching."""

    def _normalize(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            captions, captions, captions, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}
