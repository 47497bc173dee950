"""Flux.1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .stable_diffusion_3 import StableDiffusion3


class Flux(StableDiffusion3):
    """Flux: CLIP and T5, flow matching on latents packed into 2 x 2 patches."""

    passes_sigmas = True

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.in_channels //= 4

    @property
    def size_multiple(self) -> int:
        return 2 * self._vae_scale

    @property
    def default_resolution(self) -> int:
        return self.pipe.default_sample_size * self._vae_scale

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, pooled, _ = self.pipe.encode_prompt(captions, device=self.pipe.text_encoder.device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        arguments = self._arguments(noisy, timesteps, conditions)
        packed = model(**arguments, context=context, return_dict=False)[0]
        return F.pixel_shuffle(packed.mT.unflatten(2, [n // 2 for n in noisy.shape[2:]]), 2)

    def _pack(self, noisy: Tensor) -> Tensor:
        return F.pixel_unshuffle(noisy, 2).flatten(2).mT

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        rows, columns = (torch.arange(n // 2, device=noisy.device, dtype=noisy.dtype) for n in noisy.shape[2:])
        # Data are predicted without amplified guidance; 1 is no amplification.
        amplified = self._config.get("guidance_embeds", False)
        guidance = {"guidance": noisy.new_ones(len(noisy), dtype=torch.float32)} if amplified else {}
        return {
            "hidden_states": self._pack(noisy),
            "timestep": timesteps / 1000,
            "img_ids": torch.cartesian_prod(rows.new_zeros(1), rows, columns),
            "txt_ids": noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
            **guidance,
            **conditions,
        }
