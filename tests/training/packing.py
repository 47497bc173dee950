"""What pipelines call their transformers with -> what a base is trained on, as the pipelines do it; of 16 pixels."""

from typing import Any

import diffusers
import torch
from torch import Tensor

# Where the pipeline's guidance scale amplifies nothing, if that is not 1.
NO_GUIDANCE = {"z_image": 0.0, "krea2": 0.0}
# Whose pipelines do not shift the schedule by the size of images.
STATIC = ("stable_diffusion_3", "sana", "aura_flow", "hunyuan_image")


def unpacked(name: str, data: Any) -> Tensor:
    """A transformer's input, or latents of the pipeline -> (B, C, H, W)."""
    if name in ("flux", "chroma"):
        return diffusers.FluxPipeline._unpack_latents(data, 16, 16, 2)
    if name in ("qwen_image", "krea2"):
        return diffusers.QwenImagePipeline._unpack_latents(data, 16, 16, 2).squeeze(2)
    if name.startswith("flux2"):
        ids = diffusers.Flux2Pipeline._prepare_latent_ids(torch.zeros(len(data), 1, 4, 4))
        return diffusers.Flux2Pipeline._unpack_latents_with_ids(data, ids)
    return torch.stack(data).squeeze(2) if isinstance(data, list) else data


def velocity(name: str, output: Any) -> Tensor:
    """A transformer's output -> noise - data (B, C, H, W)."""
    sign = -1 if name in ("z_image", "lumina2", "hidream_image") else 1
    return sign * unpacked(name, output)


def scheduler_time(name: str, time: Tensor) -> Tensor:
    """The time that a transformer was given -> in the scheduler's units."""
    if name == "sana":
        return 2 * time
    if name in ("z_image", "lumina2"):
        return 1000 - 1000 * time
    return 1000 * time if name.startswith(("flux", "qwen", "chroma", "krea", "aura")) else time


def noise_argument(name: str, noise: Tensor) -> Tensor:
    """Noise (B, C, H, W) -> what the pipeline takes for `latents`."""
    if name in ("flux", "qwen_image", "chroma", "krea2"):
        return diffusers.FluxPipeline._pack_latents(noise, *noise.shape)
    return noise


def step_latents(name: str, latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) -> what the pipeline has between its steps."""
    return latents.flatten(2).mT if name.startswith("flux2") else noise_argument(name, latents)
