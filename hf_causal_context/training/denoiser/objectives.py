"""What a model is trained to do: a batch -> one loss per sample.

Shapes: B samples, C channels, H x W pixels or latents, K concepts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from ...bases.diffusion_base import DiffusionBase
from ...errors import UserValueError
from ..noise import Draws
from .edits import Edits


@dataclass
class Batch:
    """Samples on the model's device.

    `clean` (B, C, H, W): what the denoiser models, pixels in [-1, 1] or latents. `context` (B, K): the intervention
    mask. `conditions`: row-wise tensors of captions or classes. `draws`: the samples' noise. `loss_mask` (B, 1, H, W):
    how much each place counts in the loss; None where all count alike. `captions`: those of the rows that are still to
    be encoded, if any. `apart` (B,), bool: which samples are class images, whose losses are of no context; None where
    none are. `edits`: pairs to train on besides, if any. `weight`: what its mean loss counts beside those of others.
    """

    clean: Tensor
    context: Tensor
    conditions: dict[str, Tensor]
    draws: Draws
    loss_mask: Tensor | None = None
    captions: list[str] = field(default_factory=list)
    apart: Tensor | None = None
    edits: Edits | None = None
    weight: float = 1.0

    def losses(self, errors: Tensor) -> Tensor:
        """Errors (B, C, H, W) -> the means of their squares (B,), over what the masks show."""
        squares = errors.square()
        if self.loss_mask is None:
            return squares.flatten(1).mean(1)
        weights = self.loss_mask.expand_as(squares).flatten(1)
        return (squares.flatten(1) * weights).sum(1) / weights.sum(1)


class DiffusionObjective:
    """Denoising at a random time step of the base's schedule, for epsilon, v and sample prediction.

    `snr_gamma` weights time steps by min(SNR, gamma): Hang et al., "Efficient Diffusion Training via Min-SNR Weighting
    Strategy" (ICCV 2023).
    """

    def __init__(self, base: DiffusionBase, snr_gamma: float | None = None) -> None:
        self.base = base
        self.scheduler: Any = base.noise_scheduler()
        self.snr_gamma = snr_gamma

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses (B,), one per sample."""
        clean, device = batch.clean, batch.clean.device
        timesteps = batch.draws.integers(self.scheduler.config.num_train_timesteps).to(device)
        noise = batch.draws.normal(*clean.shape[1:]).to(clean)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        prediction = self.base.predict(model, noisy, timesteps, batch.conditions, batch.context)
        target = self._target(clean, noise, timesteps)
        losses = batch.losses(prediction.float() - target.float())
        return losses if self.snr_gamma is None else losses * self._weights(timesteps)

    def _target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.base.prediction == "v_prediction":
            return self.scheduler.get_velocity(clean, noise, timesteps)
        return noise if self.base.prediction == "epsilon" else clean

    def _weights(self, timesteps: Tensor) -> Tensor:
        assert self.snr_gamma is not None
        snr = compute_snr(self.scheduler, timesteps)
        weights = snr.clamp(max=self.snr_gamma)
        if self.base.prediction == "epsilon":
            return weights / snr.clamp(min=1e-8)  # a terminal SNR of zero
        return weights / (snr + 1) if self.base.prediction == "v_prediction" else weights


class FlowMatchingObjective:
    """Velocity noise - clean at x = (1 - sigma) clean + sigma noise, with logit-normal times (Esser et al., 2024).

    Times are those that the denoiser serves.
    """

    def __init__(self, base: DiffusionBase) -> None:
        self.base = base
        self.scheduler: Any = base.noise_scheduler()
        low, high = (share * base.num_train_timesteps for share in base.noise_range)
        times = self.scheduler.timesteps
        self._served = ((times >= low) & ((times < high) | (high == base.num_train_timesteps))).nonzero()[:, 0]

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Losses (B,), one per sample."""
        clean, count = batch.clean, len(self._served)
        index = self._served[(torch.sigmoid(batch.draws.normal()) * count).long().clamp(max=count - 1)]
        sigmas = self.scheduler.sigmas[index].to(clean).view(-1, *(1,) * (clean.ndim - 1))
        timesteps = self.scheduler.timesteps[index].to(clean.device)
        noise = batch.draws.normal(*clean.shape[1:]).to(clean)
        noisy = (1 - sigmas) * clean + sigmas * noise
        prediction = self.base.predict(model, noisy, timesteps, batch.conditions, batch.context)
        return batch.losses(prediction.float() - (noise - clean).float())


def denoising_objective(
    base: DiffusionBase, snr_gamma: float | None = None
) -> DiffusionObjective | FlowMatchingObjective:
    """Return the objective that a base was pretrained with.

    Raises:
        ValueError: for Min-SNR weighting of a flow-matching base.
    """
    if base.prediction != "flow":
        return DiffusionObjective(base, snr_gamma)
    if snr_gamma is not None:
        raise UserValueError(
            "--snr_gamma weights diffusion schedules; this base is trained by flow matching. Leave it out."
        )
    return FlowMatchingObjective(base)
