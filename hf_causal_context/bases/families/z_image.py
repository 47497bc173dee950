"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .stable_diffusion_3 import StableDiffusion3


class ZImage(StableDiffusion3):
    """Z-Image: one list entry per sample, captions as long as they are, and time and velocity from noise to data."""

    passes_sigmas = True

    @property
    def size_multiple(self) -> int:
        return 2 * self._vae_scale

    @property
    def default_resolution(self) -> int:
        return 1024

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        # The pipeline writes into the list that it is given.
        each, _ = self.pipe.encode_prompt([*captions], self.pipe.text_encoder.device, False)
        return self.join_conditions([{"text": text, "mask": torch.ones_like(text[:, 0]).bool()} for text in each])

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        arguments = self._arguments(noisy, timesteps, conditions)
        return -torch.stack(model(**arguments, context=context, return_dict=False)[0]).squeeze(2)

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "x": list(noisy.unsqueeze(2)),
            "t": 1 - timesteps / 1000,
            "cap_feats": [text[mask] for text, mask in zip(conditions["text"], conditions["mask"], strict=True)],
        }
