"""HunyuanVideo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..video_base import VideoBase


class HunyuanVideo(VideoBase):
    """HunyuanVideo: Llama after the pipeline's template, CLIP, flow matching, and guidance as a condition."""

    frame_rate = 24

    @property
    def size_multiple(self) -> int:
        return max(16, super().size_multiple)  # the pipeline refuses others

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, pooled, mask = self.pipe.encode_prompt(captions, device=self.pipe.text_encoder.device)
        return {
            "encoder_hidden_states": hidden,
            "pooled_projections": pooled,
            "encoder_attention_mask": mask.to(hidden.dtype),
        }

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        times = timesteps.to(noisy.dtype)
        # Data are predicted without amplified guidance; 1 is no amplification.
        return {**super()._arguments(noisy, times, conditions), "guidance": torch.full_like(times, 1000)}
