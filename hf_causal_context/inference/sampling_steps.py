"""The steps of a stochastic sampler of any base, written as an edit needs them.

Shapes: B images, C channels, H x W pixels or latent pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..bases.diffusion_base import DiffusionBase
from ..errors import UserValueError

_SMALLEST_SNR = 1e-4


def clean_of(prediction: str, x: Tensor, output: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
    """What a denoiser takes for the clean images of x = alpha clean + sigma noise, by the kind of its output."""
    if prediction == "sample":
        return output
    if prediction == "flow":
        return x - sigma * output
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    return (x - sigma * output) / alpha


def times_for(prediction: str, times: Tensor) -> Tensor:
    """Times (B,) as the denoiser takes them: of flows as they are, else whole numbers."""
    return times if prediction == "flow" else times.long()


def sampling_steps(base: DiffusionBase, num: int, clean: Tensor) -> list[Step]:
    """Return about so many steps of a base's sampler, from noise towards images like `clean` (B, C, H, W).

    Raises:
        ValueError: for so few that none is left between pure noise and the image.
    """
    scheduler: Any = base.pipe.scheduler
    if base.prediction == "flow":
        flow: Any = base.euler_scheduler()
        flow.set_timesteps(num, **base.flow_schedule(num, clean))
        times, sigmas = flow.timesteps, flow.sigmas.double()
        alphas = 1 - sigmas
    else:
        diffusion: Any = DDIMScheduler.from_config(scheduler.config)
        diffusion.set_timesteps(num)
        times, squares = diffusion.timesteps, diffusion.alphas_cumprod[diffusion.timesteps].double()
        # What is predicted of (almost) pure noise is not about the image.
        times, squares = times[squares > _SMALLEST_SNR], squares[squares > _SMALLEST_SNR]
        if not len(times):
            raise UserValueError(
                f"num_inference_steps={num} leads from pure noise to the image without a step in between. "
                "Use more; 50 is usual."
            )
        alphas = torch.cat([squares.sqrt(), torch.ones(1)])
        sigmas = torch.cat([(1 - squares).sqrt(), torch.zeros(1)])
    columns = (times, alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:])
    return [Step(*(float(value) for value in row)) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Step:
    """From x' = alpha x + sigma e to the less noisy one; `time` as the denoiser knows it."""

    time: float
    alpha: float
    sigma: float
    next_alpha: float
    next_sigma: float

    @property
    def deviation(self) -> float:
        """Of the less noisy x', given the noisier one and the clean image; 1 where that is certain."""
        return self.next_sigma * math.sqrt(max(0.0, 1 - self._kept**2)) or 1.0

    def mean(self, x: Tensor, clean: Tensor) -> Tensor:
        """Of the less noisy x'."""
        return self.next_alpha * clean + self.next_sigma * self._kept * (x - self.alpha * clean) / self.sigma

    @property
    def _kept(self) -> float:
        """How much of the noise in x stays."""
        return self.alpha * self.next_sigma / (self.next_alpha * self.sigma)
