"""Krea 2."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .qwen_image import QwenImage


class Krea2(QwenImage):
    """Krea 2: Qwen-Image's autoencoder, several layers of a language model, and text and patches in one sequence."""

    @property
    def default_resolution(self) -> int:
        return 1024

    def flow_schedule(self, num_steps: int, latents: Tensor) -> dict[str, Any]:
        shift = {"mu": 1.15} if cast(Any, self.pipe.config).is_distilled else {}
        return {**super().flow_schedule(num_steps, latents), **shift}

    def guidance_options(self, scale: float, rows: int = 1) -> dict[str, Any]:
        return {"guidance_scale": scale}

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, mask = self.pipe.encode_prompt(captions, self.pipe.text_encoder.device)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        rows, columns = (torch.arange(n // 2, device=noisy.device, dtype=torch.float32) for n in noisy.shape[2:])
        words = rows.new_zeros(conditions["encoder_hidden_states"].shape[1], 3)
        return {
            "hidden_states": self._pack(noisy),
            "timestep": timesteps / self.num_train_timesteps,
            "position_ids": torch.cat([words, torch.cartesian_prod(rows.new_zeros(1), rows, columns)]),
            **conditions,
        }
