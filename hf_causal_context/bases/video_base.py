"""A pretrained pipeline of videos as the trainer sees it: what families of video denoisers have in common.

Shapes: B batch, C channels, F frames, H x W pixels or latent pixels.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserValueError
from .diffusion_base import DiffusionBase


class VideoBase(DiffusionBase):
    """A pipeline of clips (B, C, F, H, W); an image is a clip of one frame."""

    is_video: ClassVar[bool] = True

    @property
    def image_channels(self) -> int:
        return 3  # some autoencoders name their channels after cutting patches

    @property
    def _vae_scale(self) -> int:
        return self.pipe.vae_scale_factor_spatial

    @property
    def _frame_step(self) -> int:
        """Frames of a clip are one, and a multiple of it."""
        return self.pipe.vae_scale_factor_temporal

    @property
    def default_resolution(self) -> int:
        return self._default("height")

    @property
    def default_frames(self) -> int:
        return self._default("num_frames")

    @property
    def sampling_options(self) -> dict[str, Any]:
        # Training is on squares, and the pipeline's default is not.
        return {"height": self.default_resolution, "width": self.default_resolution}

    @property
    def pipeline_tag(self) -> str:
        return "text-to-video"

    def _default(self, argument: str) -> Any:
        """Of the pipeline's call."""
        return inspect.signature(self.pipe.__call__).parameters[argument].default

    def check_frames(self, num_frames: int | None) -> None:
        step = self._frame_step
        if num_frames is not None and (num_frames < 1 or (num_frames - 1) % step):
            below = 1 + max(0, num_frames - 1) // step * step
            raise UserValueError(
                f"num_frames={num_frames} does not fit {type(self.pipe).__name__}, whose autoencoder takes 1 frame and "
                f"then {step} at a time. The nearest allowed: {below} and {below + step}."
            )

    def _encode(self, pixels: Tensor) -> Tensor:
        # One by one: the activations of a clip fill memory as those of many images.
        return torch.cat([self.pipe.vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)])

    def _decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.pipe.vae.decode(clip, return_dict=False)[0] for clip in latents.split(1)])

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        # Those of T5, with its mask.
        hidden, mask, _, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, device=self.pipe.text_encoder.device
        )
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
