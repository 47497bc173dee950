"""A small hierarchical VAE: three groups of latents, the lower ones conditioned on those above.

After Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder" (NeurIPS 2020), whose residual posteriors it
has; much smaller than NVAE. Shapes: B samples, C channels, S x S pixels.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserValueError
from ..functional import normal_like


class HierarchicalVAE(nn.Module):
    """Bottom-up features at S/2, S/4 and S/8; top-down latents at S/8 (`top`), S/4 and S/2.

    `top` maps features (B, 4 width, S/8, S/8) to the top latent of the same shape and its KL divergence (B,). A
    `ContextAutoencoder` with `latent_module="top"` puts a context module in its place.

    Args:
        size: side S of the images, a multiple of 8.
        channels: C.
        width: channels at S/2; twice and four times as many below.
        latent_channels: of the two lower groups.

    Raises:
        ValueError: for another size, or numbers below 1.
    """

    output: Literal["logits"] = "logits"

    def __init__(self, size: int = 32, channels: int = 3, width: int = 16, latent_channels: int = 4) -> None:
        if size < 8 or size % 8:
            raise UserValueError(f"size={size} must be a multiple of 8. Resize the images.")
        for name, number in {"channels": channels, "width": width, "latent_channels": latent_channels}.items():
            if number < 1:
                raise UserValueError(f"{name}={number} must be at least 1.")
        super().__init__()
        self.config: dict[str, Any] = {
            "size": size,
            "channels": channels,
            "width": width,
            "latent_channels": latent_channels,
        }
        self.size, self.channels = size, channels
        self.latent_shape = (4 * width, size // 8, size // 8)
        self.up = nn.ModuleList(
            _block(nn.Conv2d(before, after, 4, 2, 1), after)
            for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width))
        )
        self.top = GaussianLatent(4 * width)
        self.down = nn.ModuleList(
            _block(nn.ConvTranspose2d(before, after, 4, 2, 1), after)
            for before, after in ((4 * width, 2 * width), (2 * width, width))
        )
        self.groups = nn.ModuleList(LatentGroup(features, latent_channels) for features in (2 * width, width))
        self.to_output = nn.ConvTranspose2d(width, channels, 4, 2, 1)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) in [0, 1] -> logits of their reconstructions, and all groups' KL divergence (B,)."""
        levels = []
        features = images
        for block in self.up:
            features = block(features)
            levels.append(features)
        state, kl = self.top(levels.pop(), generator)
        for block, group in zip(self.down, self.groups, strict=True):
            state, kl_group = group(block(state), levels.pop(), generator)
            kl = kl + kl_group
        return self.to_output(state), kl

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Logits (num, C, S, S) of images drawn from the prior."""
        no_features = self.to_output.weight.new_zeros(num, *self.latent_shape)
        state, _ = self.top(no_features, generator, prior=True)
        for block, group in zip(self.down, self.groups, strict=True):
            state, _ = group(block(state), None, generator)
        return self.to_output(state)


class GaussianLatent(nn.Module):
    """Features -> a latent with a standard normal prior, and its KL divergence."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.to_posterior = nn.Conv2d(features, 2 * features, 1)

    def forward(
        self, features: Tensor, generator: torch.Generator | None = None, prior: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Features (B, D, h, w) -> latent (B, D, h, w) and KL (B,); the features' values do not matter for `prior`."""
        noise = normal_like(features, generator)
        if prior:
            return noise, features.new_zeros(len(features))
        mean, log_variance = self.to_posterior(features).chunk(2, dim=1)
        log_variance = log_variance.clamp(-15, 5)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return mean + (0.5 * log_variance).exp() * noise, kl.flatten(1).sum(1)


class LatentGroup(nn.Module):
    """One lower group: its prior depends on the state from above, its posterior is a residual to that prior."""

    def __init__(self, features: int, latent_channels: int) -> None:
        super().__init__()
        self.to_prior = nn.Conv2d(features, 2 * latent_channels, 1)
        self.to_residual = nn.Conv2d(2 * features, 2 * latent_channels, 3, padding=1)
        self.to_state = nn.Conv2d(latent_channels, features, 3, padding=1)

    def forward(
        self, state: Tensor, features: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """State and features of the images (None: sample the prior), (B, D, h, w) each -> next state and KL (B,)."""
        mean, log_variance = self.to_prior(state).chunk(2, dim=1)
        log_variance = log_variance.clamp(-10, 5)
        kl = state.new_zeros(len(state))
        if features is not None:
            shift, log_ratio = self.to_residual(torch.cat((state, features), dim=1)).chunk(2, dim=1)
            log_ratio = log_ratio.clamp(-10, 5)
            # Of N(mean + shift, e^(lv + ratio)) from N(mean, e^lv), which is what makes the residual form stable.
            terms = shift.square() / log_variance.exp() + log_ratio.exp() - 1 - log_ratio
            kl = 0.5 * terms.flatten(1).sum(1)
            mean, log_variance = mean + shift, log_variance + log_ratio
        latent = mean + (0.5 * log_variance).exp() * normal_like(mean, generator)
        return state + self.to_state(latent), kl


def _block(convolution: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.SiLU())
