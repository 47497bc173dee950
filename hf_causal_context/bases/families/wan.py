"""Wan 2.1 and 2.2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..video_base import VideoBase


class Wan(VideoBase):
    """Wan: UMT5, flow matching; 2.2 has one denoiser for high and one for low noise, of which one is trained."""

    frame_rate = 16

    @property
    def size_multiple(self) -> int:
        return self._vae_scale * self._config.patch_size[1]

    @property
    def noise_range(self) -> tuple[float, float]:
        boundary = self.pipe.config["boundary_ratio"]
        if boundary is None:
            return 0.0, 1.0
        return (boundary, 1.0) if self.denoiser_name == "transformer" else (0.0, boundary)

    def noise_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        config = self.pipe.scheduler.config
        return self.euler_scheduler(shift=config.get("flow_shift", config.get("shift", 1.0)))

    def _normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, _ = self.pipe.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            max_sequence_length=self._default("max_sequence_length"),
            device=self.pipe.text_encoder.device,
        )
        return {"encoder_hidden_states": hidden}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        if self.pipe.config["expand_timesteps"]:  # one for each patch
            timesteps = timesteps[:, None].expand(-1, noisy[0, 0, :, ::2, ::2].numel())
        return super()._arguments(noisy, timesteps, conditions)
