"""AuraFlow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diffusion_base import DiffusionBase


class AuraFlow(DiffusionBase):
    """AuraFlow: T5 with zeros where a caption ended, flow matching with times up to 1."""

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, _, _, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, device=self.pipe.text_encoder.device
        )
        return {"encoder_hidden_states": hidden}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        return super()._arguments(noisy, timesteps / 1000, conditions)
