"""Chroma."""

from __future__ import annotations

from collections.abc import Callable
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
        self._mask = F.pad(conditions["attention_mask"], (0, patches), value=1)
        return {**arguments, "attention_mask": self._mask}

    def enable_gradient_checkpointing(self) -> None:
        super().enable_gradient_checkpointing()
        denoiser: Any = self.denoiser
        checkpoint = denoiser._gradient_checkpointing_func

        def with_mask(block: Callable[..., Any], *inputs: Any) -> Any:
            # Under checkpointing alone, diffusers forgets the mask of blocks with text and patches in one sequence.
            return checkpoint(block, *inputs, *([self._mask] if len(inputs) == 3 else []))

        denoiser._gradient_checkpointing_func = with_mask
