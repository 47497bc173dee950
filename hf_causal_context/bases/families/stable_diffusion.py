"""Stable Diffusion 1 and 2."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion_base import DiffusionBase


class StableDiffusion(DiffusionBase):
    """Stable Diffusion 1 and 2: one CLIP encoder."""

    denoiser_name = "unet"
    _input_name = "sample"

    @property
    def size_multiple(self) -> int:
        return max(8, self._vae_scale)  # the pipeline refuses others

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        pipe = self.pipe
        return {"encoder_hidden_states": pipe.encode_prompt(captions, pipe.text_encoder.device, 1, False)[0]}
