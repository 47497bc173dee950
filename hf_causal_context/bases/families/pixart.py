"""PixArt-alpha and -sigma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diffusion_base import DiffusionBase


class PixArt(DiffusionBase):
    """PixArt-alpha and -sigma: T5 with its attention mask, a learned variance."""

    @property
    def sampling_options(self) -> dict[str, Any]:
        # Cleaning needs packages that may be missing; binning would generate at another resolution than was trained.
        return {"clean_caption": False, "use_resolution_binning": False}

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, attention_mask, _, _ = self.pipe.encode_prompt(
            captions, False, device=self.pipe.text_encoder.device, clean_caption=False
        )
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": attention_mask}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:
            height, width = (n * self._vae_scale for n in noisy.shape[2:])
            values = noisy.new_tensor([height, width, height / width]).expand(len(noisy), -1)
            added = {"resolution": values[:, :2], "aspect_ratio": values[:, 2:]}
        return {**super()._arguments(noisy, timesteps, conditions), "added_cond_kwargs": added}
