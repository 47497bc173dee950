"""FLUX.2, dev and klein."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from ..diffusion_base import DiffusionBase


class Flux2(DiffusionBase):
    """FLUX.2: layers of a language model, flow matching on 2 x 2 patches normalized by the VAE's batch norm."""

    @property
    def _vae_scale(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    @property
    def default_resolution(self) -> int:
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def flow_schedule(self, num_steps: int, latents: Tensor) -> dict[str, Any]:
        sigmas = np.linspace(1, 1 / num_steps, num_steps)
        return {"sigmas": sigmas, "mu": compute_empirical_mu(latents[0, 0].numel(), num_steps)}

    def _encode(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(super()._encode(pixels), 2)

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(F.pixel_shuffle(latents, 2))

    def _normalize(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        mean, deviation = (values.view(1, -1, 1, 1).to(latents) for values in (vae.bn.running_mean, deviation))
        return (latents - mean) / deviation

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.pipe.encode_prompt(captions, device=self.pipe.text_encoder.device)[0]}

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        arguments = self._arguments(noisy, timesteps, conditions)
        tokens = model(**arguments, context=context, return_dict=False)[0]
        return tokens.mT.unflatten(2, noisy.shape[2:])

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        zero, rows, columns, words = (
            torch.arange(n, device=noisy.device)
            for n in (1, *noisy.shape[2:], conditions["encoder_hidden_states"].shape[1])
        )
        # Data are predicted without amplified guidance; 1 is no amplification.
        guidance = noisy.new_ones(len(noisy), dtype=torch.float32) if self._config.guidance_embeds else None
        return {
            "hidden_states": noisy.flatten(2).mT,
            "timestep": timesteps / 1000,
            "guidance": guidance,
            "img_ids": torch.cartesian_prod(zero, rows, columns, zero).expand(len(noisy), -1, -1),
            "txt_ids": torch.cartesian_prod(zero, zero, zero, words).expand(len(noisy), -1, -1),
            **conditions,
        }
