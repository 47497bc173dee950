"""Mochi 1."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from ..video_base import VideoBase


class Mochi(VideoBase):
    """Mochi: T5 with its mask, a flow from noise at time 0 to data at 1000."""

    frame_rate = 30

    @property
    def _vae_scale(self) -> int:
        return self.pipe.vae_spatial_scale_factor

    @property
    def _frame_step(self) -> int:
        return self.pipe.vae_temporal_scale_factor

    @property
    def default_resolution(self) -> int:
        return self.pipe.default_height

    def noise_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return self.euler_scheduler(invert_sigmas=False)

    def _normalize(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) * config.scaling_factor / std

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, mask, _, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, device=self.pipe.text_encoder.device
        )
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        return -super().predict(model, noisy, timesteps, conditions, context)

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        times = (self.num_train_timesteps - timesteps).to(noisy.dtype)
        return super()._arguments(noisy, times, conditions)
