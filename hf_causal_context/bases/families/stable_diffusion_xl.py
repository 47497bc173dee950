"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two CLIP encoders, the second one's pooled output, and sizes as further conditions."""

    def _normalize(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super()._normalize(latents)
        mean, std = self._latent_statistics(latents)
        return (latents - mean) * config.scaling_factor / std

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            captions, device=self.pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        height, width = (n * self._vae_scale for n in noisy.shape[2:])
        text = conditions["text_embeds"]
        # Original size, top left corner, target size: the pipeline's defaults, so that training and sampling agree.
        sizes = text.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
        return {
            "sample": noisy,
            "timestep": timesteps,
            "encoder_hidden_states": conditions["encoder_hidden_states"],
            "added_cond_kwargs": {"text_embeds": text, "time_ids": sizes},
        }
