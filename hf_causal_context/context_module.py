"""The paper's context module in generator space: exogenous noise -> concepts -> features of a decoder.

Markham et al., "Intervening to Learn and Compose Causally Disentangled Representations" (CLeaR 2026), section 3.
Shapes: B samples, F features, K concepts, N noise width, W concept width, both per concept.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import functional as F
from .errors import UserValueError


class Posterior(NamedTuple):
    """A diagonal Gaussian over the exogenous coordinates: `mean` and `log_variance`, each (B, K, N)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw per row, (B, K, N), differentiable in the parameters."""
        return torch.addcmul(self.mean, F.normal_like(self.mean, generator), (0.5 * self.log_variance).exp())

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal distribution in nats, (B,)."""
        mean, log_variance = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in self)
        terms = mean.square() + log_variance.exp() - 1 - log_variance
        return 0.5 * terms.flatten(1).sum(1)


class NoiseModule(nn.Module):
    """Features -> exogenous coordinates -> features, without concepts: what the ablations without a context module use.

    Args:
        in_features, out_features: of the encoder and the decoder, F.
        num_concepts: K.
        noise_width: N.

    Raises:
        ValueError: for numbers below 1.
    """

    def __init__(self, in_features: int, out_features: int, num_concepts: int, noise_width: int) -> None:
        _check_minima(1, num_concepts=num_concepts, noise_width=noise_width)
        super().__init__()
        self.num_concepts, self.noise_width = num_concepts, noise_width
        self.mean = nn.Linear(in_features, num_concepts * noise_width)
        self.log_variance = nn.Linear(in_features, num_concepts * noise_width)
        self.output = nn.Linear(num_concepts * noise_width, out_features)

    def encode(self, features: Tensor, mask: Tensor) -> Posterior:
        """The posterior of the exogenous coordinates given features (B, F) and an intervention mask (B or 1, K)."""
        return self._posterior(self.mean(features), self.log_variance(features))

    def _posterior(self, mean: Tensor, log_variance: Tensor) -> Posterior:
        shape = (self.num_concepts, self.noise_width)
        # Variances beyond e^10 or below e^-30 mean nothing, and overflow.
        return Posterior(mean.unflatten(1, shape), log_variance.clamp(-30, 10).unflatten(1, shape))

    def concepts(self, noise: Tensor, mask: Tensor) -> Tensor:
        """Coordinates (B, K, N) and an intervention mask (B or 1, K) -> concepts: here the coordinates themselves."""
        return noise

    def forward(self, noise: Tensor, mask: Tensor) -> Tensor:
        """Coordinates (B, K, N) and an intervention mask (B or 1, K) -> features for the decoder (B, F)."""
        return self.output(self.concepts(noise, mask).flatten(1))


class ContextModule(NoiseModule):
    """Exogenous coordinates -> intervenable block-linear -> GELU -> expressive layers -> causal layer -> features.

    Every sample of a batch may have another context. Strengths other than 0 and 1 inter- and extrapolate the map of an
    intervened concept linearly; edges are cut by clamp(strength, 0, 1).

    Args:
        in_features, out_features: of the encoder and the decoder, F.
        num_concepts: K.
        noise_width, concept_width: N and W.
        depth: widths from N to W in equal steps, so `depth` - 1 expressive layers.
        perfect_interventions: an intervened concept listens to no other; by default unless `published`.
        encode_context: the posterior of a concept's coordinates depends on whether it is intervened on; by default
            unless `published`. Otherwise an image has the same coordinates in every context, so contexts that share
            images can hardly differ in what they make of the coordinates.
        published: compute what the published experiments computed. Then the first layer's weights are dense, and mix
            concepts in the observational context, with one bias for all contexts; in joint interventions an intervened
            concept listens to the others that are intervened on; and the causal weights are kept in [0, 1] by
            `after_step`.

    Its weights; when published, one for each published one (linear layers have .weight and .bias):

        mean, log_variance              linear F -> K N
        mean_shift, log_variance_shift  the same, for concepts that are intervened on; with `encode_context` only
        first.observational             (K, N, N), or (K N, K N) when published
        first.interventional            the same
        first.bias                      (K, N), or (K N,) when published
        first.interventional_bias       (K, N), unless published
        expressive.<i>.linear.weight    (K, out, in)
        expressive.<i>.linear.bias      (K, out)
        expressive.<i>.norm             batch norm of K out features
        causal.observational            (K W, K W), row = effect; its diagonal blocks are not used
        causal.interventional           the same
        causal.bias                     (K W,), shared by all contexts
        output                          linear K W -> F

    A dense (K out, K in) matrix given for `expressive.<i>.linear.weight` is loaded by its diagonal blocks.

    Raises:
        ValueError: for numbers out of range, or perfect interventions of the published variant.

    Example:
        >>> module = ContextModule(128, 128, num_concepts=2, noise_width=4, concept_width=3)
        >>> mask = torch.tensor([[1.0, 0.0]])
        >>> posterior = module.encode(torch.zeros(5, 128), mask)
        >>> module(posterior.sample(), mask).shape
        torch.Size([5, 128])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_concepts: int,
        noise_width: int,
        concept_width: int,
        depth: int = 2,
        perfect_interventions: bool | None = None,
        encode_context: bool | None = None,
        published: bool = False,
    ) -> None:
        _check_minima(1, concept_width=concept_width)
        _check_minima(2, depth=depth)
        for name, value in {"perfect_interventions": perfect_interventions, "encode_context": encode_context}.items():
            if published and value:
                raise UserValueError(
                    f"published=True computes what the published experiments did, which had no {name}. Leave one of "
                    "them out."
                )
        super().__init__(in_features, out_features, num_concepts, noise_width)
        self.concept_width = concept_width
        self.encode_context = not published if encode_context is None else encode_context
        if self.encode_context:
            self.mean_shift = _zero(nn.Linear(in_features, num_concepts * noise_width))
            self.log_variance_shift = _zero(nn.Linear(in_features, num_concepts * noise_width))
        step = (concept_width - noise_width) / (depth - 1)
        widths = [int(noise_width + step * i) for i in range(depth - 1)] + [concept_width]
        self.first = (DenseInterventionLayer if published else InterventionLayer)(num_concepts, noise_width)
        self.expressive = nn.Sequential(
            *(ExpressiveLayer(num_concepts, before, after) for before, after in pairwise(widths))
        )
        self.causal = CausalLayer(
            num_concepts,
            concept_width,
            perfect_interventions=not published if perfect_interventions is None else perfect_interventions,
            weights_in_unit_interval=published,
        )
        self.output = nn.Linear(num_concepts * concept_width, out_features)

    def encode(self, features: Tensor, mask: Tensor) -> Posterior:
        """The posterior of the exogenous coordinates given features (B, F) and an intervention mask (B or 1, K)."""
        mean, log_variance = self.mean(features), self.log_variance(features)
        if self.encode_context:
            m = F.per_feature(mask, mean)
            mean = mean + m * self.mean_shift(features)
            log_variance = log_variance + m * self.log_variance_shift(features)
        return self._posterior(mean, log_variance)

    def concepts(self, noise: Tensor, mask: Tensor) -> Tensor:
        """Coordinates (B, K, N) and an intervention mask (B or 1, K) -> concepts (B, K, W)."""
        e_BKN = nn.functional.gelu(self.first(noise, mask))
        return self.causal(self.expressive(e_BKN), mask)


class InterventionLayer(nn.Module):
    """One affine map per concept, another one where it is intervened on: `functional.intervenable`."""

    def __init__(self, num_concepts: int, width: int) -> None:
        super().__init__()
        self.observational = _uniform(width, num_concepts, width, width)
        self.bias = _uniform(width, num_concepts, width)
        # An intervention starts with an effect of its own, a strong one: without, the first steps put what it changes
        # into any concept, and it stays there.
        self.interventional = _uniform(width, num_concepts, width, width)
        self.interventional_bias = nn.Parameter(torch.randn(num_concepts, width))

    def forward(self, z_BKN: Tensor, mask: Tensor) -> Tensor:
        """(B, K, N) and a mask (B or 1, K) -> (B, K, N)."""
        mapped = F.intervenable(z_BKN, mask, self.observational, self.interventional)
        return mapped + torch.lerp(self.bias, self.interventional_bias, mask[..., None].to(self.bias.dtype))


class DenseInterventionLayer(nn.Module):
    """The published first layer: dense in the observational context, block by block in every other."""

    def __init__(self, num_concepts: int, width: int) -> None:
        super().__init__()
        features = num_concepts * width
        self.observational = _uniform(features, features, features)
        self.interventional = _uniform(features, features, features)
        self.bias = _uniform(features, features)

    def forward(self, z_BKN: Tensor, mask: Tensor) -> Tensor:
        """(B, K, N) and a mask (B or 1, K) -> (B, K, N)."""
        K = z_BKN.shape[1]
        dense = F.linear(z_BKN.flatten(1), self.observational).view_as(z_BKN)
        blocks = (F.diagonal_blocks(weight, K) for weight in (self.observational, self.interventional))
        masked = F.intervenable(z_BKN, mask, *blocks)
        is_interventional = (mask != 0).any(-1)[:, None, None]
        return torch.where(is_interventional, masked, dense) + self.bias.view(dense.shape[1:])


class BlockLinear(nn.Module):
    """One affine map per concept: weight (K, out, in), bias (K, out)."""

    def __init__(self, num_concepts: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = _uniform(in_width, num_concepts, out_width, in_width)
        self.bias = _uniform(in_width, num_concepts, out_width)
        self.register_load_state_dict_pre_hook(_take_blocks)

    def forward(self, x_BKI: Tensor) -> Tensor:
        """(B, K, in) -> (B, K, out)."""
        return F.block_map(x_BKI, self.weight) + self.bias


class ExpressiveLayer(nn.Module):
    """Block-linear, batch norm, GELU; concepts never mix."""

    def __init__(self, num_concepts: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.linear = BlockLinear(num_concepts, in_width, out_width)
        self.norm = nn.BatchNorm1d(num_concepts * out_width)

    def forward(self, x_BKI: Tensor) -> Tensor:
        """(B, K, in) -> (B, K, out)."""
        x_BKO = self.linear(x_BKI)
        return nn.functional.gelu(self.norm(x_BKO.flatten(1)).view_as(x_BKO))


class CausalLayer(nn.Module):
    """The reduced form of the paper, `functional.reduced`, with one bias."""

    def __init__(
        self, num_concepts: int, width: int, *, perfect_interventions: bool, weights_in_unit_interval: bool
    ) -> None:
        super().__init__()
        features = num_concepts * width
        self.num_concepts = num_concepts
        self.perfect_interventions = perfect_interventions
        self.weights_in_unit_interval = weights_in_unit_interval
        self.observational = _uniform(features, features, features)
        self.interventional = _uniform(features, features, features)
        self.bias = _uniform(features, features)
        off_diagonal = 1 - torch.block_diag(*torch.ones(num_concepts, width, width))
        self.off_diagonal: Tensor
        self.register_buffer("off_diagonal", off_diagonal, persistent=False)

    def effects(self) -> tuple[Tensor, Tensor]:
        """Total effects of observed and of intervened causes, each (K W, K W), row = effect, zero within a concept."""
        return self.observational * self.off_diagonal, self.interventional * self.off_diagonal

    def forward(self, e_BKW: Tensor, mask: Tensor) -> Tensor:
        """(B, K, W) and a mask (B or 1, K) -> (B, K, W)."""
        c_BR = F.reduced(e_BKW.flatten(1), mask, *self.effects(), perfect_interventions=self.perfect_interventions)
        return (c_BR + self.bias).view_as(e_BKW)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring published weights back to [0, 1]; to be called after every step of an optimizer."""
        if self.weights_in_unit_interval:
            self.observational.clamp_(0, 1)
            self.interventional.clamp_(0, 1)


def _check_minima(minimum: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < minimum:
            raise UserValueError(f"{name}={value} must be at least {minimum}.")


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1).div_(math.sqrt(fan_in)))


def _take_blocks(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Load masked dense matrices, as published weights are stored, by the blocks that act."""
    assert isinstance(module, BlockLinear)
    K, out_width, in_width = module.weight.shape
    if (weight := state.get(f"{prefix}weight")) is not None and weight.shape == (K * out_width, K * in_width):
        state[f"{prefix}weight"] = F.diagonal_blocks(weight, K).contiguous()
    if (bias := state.get(f"{prefix}bias")) is not None and bias.shape == (K * out_width,):
        state[f"{prefix}bias"] = bias.view(K, out_width)
