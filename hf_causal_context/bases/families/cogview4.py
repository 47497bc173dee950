"""CogView4."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.transformers.transformer_cogview4 import CogView4TrainingAttnProcessor
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor

from ..diffusion_base import DiffusionBase


class CogView4(DiffusionBase):
    """CogView4: GLM, sizes as further conditions, and times as they were before the schedule was shifted."""

    image_stream: ClassVar[int] = 0
    encodes_together: ClassVar[bool] = False

    @property
    def size_multiple(self) -> int:
        return math.lcm(16, super().size_multiple)  # the pipeline refuses others

    def flow_schedule(self, num_steps: int, latents: Tensor) -> dict[str, Any]:
        # The pipeline passes time steps that are not shifted, too; `_arguments` finds them again.
        steps = np.linspace(self.num_train_timesteps, 1, num_steps).astype(np.int64)
        return {"sigmas": steps / self.num_train_timesteps, "mu": self._mu(latents)}

    def _mu(self, latents: Tensor) -> float:
        config = self.pipe.scheduler.config
        tokens = latents[0, 0].numel() // self._config.patch_size**2
        return calculate_shift(tokens, config.base_image_seq_len, config.base_shift, config.max_shift)

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        # Padding is seen by the encoder and the denoiser, and depends on the longest caption of a call.
        rows = []
        for _, same in itertools.groupby(captions):
            hidden, _ = self.pipe.encode_prompt(
                list(same), do_classifier_free_guidance=False, device=self.pipe.text_encoder.device
            )
            mask = torch.ones(hidden.shape[1], dtype=torch.int32, device=hidden.device)
            rows += [{"encoder_hidden_states": row, "text_attn_mask": mask} for row in hidden]
        return self.join_conditions(rows)

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        config = self.pipe.scheduler.config
        shift = config.shift
        if config.use_dynamic_shifting:
            mu = self._mu(noisy)
            shift = mu if config.time_shift_type == "linear" else math.exp(mu)
        sigmas = timesteps / self.num_train_timesteps
        hidden, mask = conditions["encoder_hidden_states"], conditions["text_attn_mask"]
        size = hidden.new_tensor([[n * self._vae_scale for n in noisy.shape[2:]]]).expand(len(noisy), -1)
        arguments = {
            "hidden_states": noisy,
            "encoder_hidden_states": hidden,
            "timestep": self.num_train_timesteps * sigmas / (sigmas + shift * (1 - sigmas)),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
        }
        if mask.all():
            return arguments
        for block in self.pipe.transformer.transformer_blocks:  # the attention that it is loaded with ignores masks
            block.attn1.set_processor(CogView4TrainingAttnProcessor())
        return {**arguments, "attention_kwargs": {"text_attn_mask": mask}}
