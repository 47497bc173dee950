"""CogVideoX 1.0 and 1.5."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..video_base import VideoBase


class CogVideoX(VideoBase):
    """CogVideoX: T5, velocities of a diffusion whose noise is shifted, and frames before channels."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.frame_rate = 16 if self._config.patch_size_t else 8

    @property
    def default_resolution(self) -> int:
        return self._config.sample_height * self._vae_scale

    @property
    def default_frames(self) -> int:
        return self._config.sample_frames

    @property
    def _frame_step(self) -> int:
        return 2 * super()._frame_step  # the autoencoder makes frames of two latent ones at a time, and more of one

    def _encode(self, pixels: Tensor) -> Tensor:
        latents = super()._encode(pixels)
        # Where patches hold several frames, the first is repeated until they are full.
        missing = -latents.shape[2] % (self._config.patch_size_t or 1)
        return torch.cat([*[latents[:, :, :1]] * missing, latents], dim=2)

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents[:, :, (latents.shape[2] + 1) % 2 :])  # without what was repeated

    def noise_scheduler(self) -> Any:
        return type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, device=self.pipe.text_encoder.device
        )
        return {"encoder_hidden_states": hidden}

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        arguments = self._arguments(noisy, timesteps, conditions)
        return model(**arguments, context=context, return_dict=False)[0].transpose(1, 2)

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        frames, *size = noisy.shape[2:]
        positions = None
        if self._config.use_rotary_positional_embeddings:
            height, width = (n * self._vae_scale for n in size)
            positions = cast(Any, self.pipe)._prepare_rotary_positional_embeddings(height, width, frames, noisy.device)
        arguments = super()._arguments(noisy.transpose(1, 2), timesteps, conditions)
        return {**arguments, "image_rotary_emb": positions}
