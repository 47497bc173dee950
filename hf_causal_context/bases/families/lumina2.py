"""Lumina Image 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from torch import Tensor, nn

from .stable_diffusion_3 import StableDiffusion3


class Lumina2(StableDiffusion3):
    """Lumina Image 2: Gemma after the pipeline's system prompt, a flow from noise at time 0 to data at 1."""

    def flow_schedule(self, num_steps: int, latents: Tensor) -> dict[str, Any]:
        config = self.pipe.scheduler.config
        shifts = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        # The pipeline takes the number of channels for the number of tokens.
        return {
            "sigmas": np.linspace(1, 1 / num_steps, num_steps),
            "mu": calculate_shift(latents.shape[1], *shifts),
        }

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, mask, _, _ = self.pipe.encode_prompt(captions, False, device=self.pipe.text_encoder.device)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        return -super().predict(model, noisy, timesteps, conditions, context)

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        return super()._arguments(noisy, 1 - timesteps / self.num_train_timesteps, conditions)
