"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .flux import Flux


class QwenImage(Flux):
    """Qwen-Image: captions with a mask, latents with an axis of frames, guidance with a negative prompt."""

    @property
    def image_channels(self) -> int:
        return self.pipe.vae.config.input_channels

    def guidance_options(self, scale: float, rows: int = 1) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": [" "] * rows}

    def _encode(self, pixels: Tensor) -> Tensor:
        return super()._encode(pixels.unsqueeze(2)).squeeze(2)

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents.unsqueeze(2)).squeeze(2)

    def _normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, mask = self.pipe.encode_prompt(captions, self.pipe.text_encoder.device)
        if mask is None:  # captions of one length
            mask = torch.ones_like(hidden[..., 0], dtype=torch.long)
        return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": self._pack(noisy),
            "timestep": timesteps / 1000,
            "img_shapes": [[(1, *(n // 2 for n in noisy.shape[2:]))]] * len(noisy),
            **conditions,
        }
