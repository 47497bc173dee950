"""HiDream-I1."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift
from torch import Tensor, nn

from .stable_diffusion_3 import StableDiffusion3


class HiDreamImage(StableDiffusion3):
    """HiDream: two CLIP encoders, T5 and layers of Llama, one area for all images, and velocities of the other sign."""

    fixed_size = True
    image_stream: ClassVar[int] = 0

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        # In training it would put out tokens. Its experts are left as they are in training: else they pass no gradient.
        self.pipe.transformer.register_to_config(force_inference_output=True)

    @property
    def default_resolution(self) -> int:
        return self.pipe.default_sample_size * self._vae_scale

    def noise_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return self.euler_scheduler(shift=3.0)

    def flow_schedule(self, num_steps: int, latents: Tensor) -> dict[str, Any]:
        if not isinstance(self.pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            return super().flow_schedule(num_steps, latents)
        return {"mu": calculate_shift(self.pipe.transformer.max_seq)}

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        t5, _, llama, _, pooled, _ = self.pipe.encode_prompt(
            captions, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        rows_of_layers = llama.transpose(0, 1)
        return {
            "encoder_hidden_states_t5": t5,
            "encoder_hidden_states_llama3": rows_of_layers,
            "pooled_embeds": pooled,
        }

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        return -super().predict(model, noisy, timesteps, conditions, context)

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        layers_of_rows = conditions["encoder_hidden_states_llama3"].transpose(0, 1)
        return {
            **conditions,
            "hidden_states": noisy,
            "timesteps": timesteps,
            "encoder_hidden_states_llama3": layers_of_rows,
        }
