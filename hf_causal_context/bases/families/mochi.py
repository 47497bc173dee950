"""Mochi 1."""

from __future__ import annotations

from typing import Any

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
        mean, std = self._latent_statistics(latents)
        return (latents - mean) * self.pipe.vae.config.scaling_factor / std

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        return -super().predict(model, noisy, timesteps, conditions, context)

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        times = (self.num_train_timesteps - timesteps).to(noisy.dtype)
        return super()._arguments(noisy, times, conditions)
