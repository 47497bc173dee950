"""What pipelines call their transformers with -> what a base is trained on, as the pipelines do it; of 16 pixels."""

from typing import Any

import diffusers
import torch
from torch import Tensor

# Where the pipeline's guidance scale amplifies nothing, if that is not 1.
NO_GUIDANCE: dict[str, float] = {}


def unpacked(name: str, data: Any) -> Tensor:
    """A transformer's input, or latents of the pipeline -> (B, C, H, W)."""
    if name == "flux":
        return diffusers.FluxPipeline._unpack_latents(data, 16, 16, 2)
    if name.startswith("flux2"):
        ids = diffusers.Flux2Pipeline._prepare_latent_ids(torch.zeros(len(data), 1, 4, 4))
        return diffusers.Flux2Pipeline._unpack_latents_with_ids(data, ids)
    return data


def velocity(name: str, output: Any) -> Tensor:
    """A transformer's output -> noise - data (B, C, H, W)."""
    return unpacked(name, output)


def scheduler_time(name: str, time: Tensor) -> Tensor:
    """The time that a transformer was given -> in the scheduler's units."""
    return 1000 * time if name.startswith("flux") else time


def noise_argument(name: str, noise: Tensor) -> Tensor:
    """Noise (B, C, H, W) -> what the pipeline takes for `latents`."""
    if name == "flux":
        return diffusers.FluxPipeline._pack_latents(noise, *noise.shape)
    return noise
