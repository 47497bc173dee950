"""LTX-Video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..video_base import VideoBase


class LTX(VideoBase):
    """LTX-Video: T5 with its mask, flow matching on latents in one row, and positions in seconds and pixels."""

    frame_rate = 25

    @property
    def _vae_scale(self) -> int:
        return self.pipe.vae_spatial_compression_ratio

    @property
    def _frame_step(self) -> int:
        return self.pipe.vae_temporal_compression_ratio

    @property
    def size_multiple(self) -> int:
        return max(32, self._vae_scale)  # the pipeline refuses others

    def _normalize(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return self.pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def _decode(self, latents: Tensor) -> Tensor:
        # Some of the autoencoders know how noisy latents are; the pipeline's default is not at all.
        time = latents.new_zeros(1) if self.pipe.vae.config.timestep_conditioning else None
        return torch.cat([self.pipe.vae.decode(clip, time, return_dict=False)[0] for clip in latents.split(1)])

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        arguments = self._arguments(noisy, timesteps, conditions)
        tokens = model(**arguments, context=context, return_dict=False)[0]
        return tokens.mT.unflatten(2, noisy.shape[2:])

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        frames, height, width = noisy.shape[2:]
        scales = (self._frame_step / self.frame_rate, self._vae_scale, self._vae_scale)
        return {
            **super()._arguments(noisy.flatten(2).mT, timesteps, conditions),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": scales,
        }
