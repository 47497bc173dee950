"""Sana."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from ..diffusion_base import DiffusionBase


class Sana(DiffusionBase):
    """Sana: Gemma after the pipeline's instruction, flow matching on latents of an autoencoder without a posterior."""

    @property
    def size_multiple(self) -> int:
        return math.lcm(32, super().size_multiple)  # the pipeline refuses others

    @property
    def sampling_options(self) -> dict[str, Any]:
        # Binning would generate at another resolution than was trained; the pipeline's default is 1024 for any base.
        size = self.default_resolution
        return {"use_resolution_binning": False, "height": size, "width": size}

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.pipe.vae.encode(pixels).latent

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        instruction = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        hidden, mask, _, _ = self.pipe.encode_prompt(
            captions, False, device=self.pipe.text_encoder.device, complex_human_instruction=instruction
        )
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        return super()._arguments(noisy, timesteps * self._config.timestep_scale, conditions)
