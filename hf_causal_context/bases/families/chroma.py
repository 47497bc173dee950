"""Chroma."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .flux import Flux


class Chroma(Flux):
    """Chroma: T5 alone, with a mask that all attention follows."""

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, _, mask, *_ = self.pipe.encode_prompt(
            captions, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "attention_mask": mask}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        arguments = super()._arguments(noisy, timesteps, conditions)
        patches = arguments["hidden_states"].shape[1]
        return {**arguments, "attention_mask": F.pad(conditions["attention_mask"], (0, patches), value=1)}
