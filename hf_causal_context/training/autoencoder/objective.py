"""The loss of a `ContextAutoencoder`, and what its three training modes do around a step.

Shapes: B samples, C channels, S x S pixels, K concepts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...context_module import ContextModule
from ...errors import UserValueError
from ...functional import group_norm
from ...models.context_autoencoder import ContextAutoencoder
from ..loop.hooks import StepHooks
from ..loop.objective import Objective

# Of the pixels, under the Gaussian likelihood.
GAUSSIAN_STANDARD_DEVIATION = 0.1
# Fine-tuning keeps the base frozen for this share of the run (the paper, section 5).
FROZEN_SHARE = 0.2


@dataclass
class ImageBatch:
    """Images (B, C, S, S) in [0, 1], their intervention mask (B, K), and the generator of the batch's noise."""

    images: Tensor
    context: Tensor
    generator: torch.Generator


class AutoencoderObjective(Objective):
    """Reconstruction error summed over pixels + beta x KL divergence + penalties of the causal weights, in nats.

    Args:
        model: whose causal weights are penalised.
        reconstruction: "bce", binary cross-entropy of pixels in [0, 1], or "gaussian" of standard deviation 0.1.
        beta: weight of the KL divergence.
        group_penalty: weight of the sum of Frobenius norms of the causal weights' blocks, one for a pair of concepts.
        l2_penalty: weight of the sum of their squares.
        mean_penalty: weight, times beta, of half the squared mean of the coordinates in each context: the part of the
            KL divergence in which contexts differ; see `squared_means`.

    Raises:
        ValueError: for a likelihood that the base's output does not fit, or penalties without causal weights.
    """

    def __init__(
        self,
        model: ContextAutoencoder,
        reconstruction: str = "bce",
        beta: float = 1.0,
        group_penalty: float = 0.0,
        l2_penalty: float = 0.0,
        mean_penalty: float = 0.0,
    ) -> None:
        module = model.context_module
        if (group_penalty or l2_penalty) and not isinstance(module, ContextModule):
            raise UserValueError("Penalties act on causal weights, and this autoencoder has no context module.")
        self.output = model.backbone.output
        if reconstruction == "bce" and self.output != "logits":
            raise UserValueError(
                f"Binary cross-entropy needs logits, and this {type(model.backbone).__name__} decodes to pixels. "
                "Use --reconstruction=gaussian."
            )
        self.reconstruction, self.beta = reconstruction, beta
        self.group_penalty, self.l2_penalty, self.mean_penalty = group_penalty, l2_penalty, mean_penalty
        self.causal = module.causal if isinstance(module, ContextModule) else None

    def __call__(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Losses (B,), one per sample."""
        output, kl, mean = model(batch.images, batch.context, batch.generator)
        divergence = kl.float()
        if self.mean_penalty:
            divergence = divergence + self.mean_penalty / 2 * squared_means(mean.float(), batch.context)
        return self.errors(output, batch.images) + self.beta * divergence + self.penalty()

    def parts(self, model: nn.Module, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Reconstruction error and KL divergence of every sample, (B,) each, in nats."""
        output, kl, _ = model(batch.images, batch.context, batch.generator)
        return self.errors(output, batch.images), kl.float()

    def errors(self, output: Tensor, images: Tensor) -> Tensor:
        """Reconstruction error of every image, (B,), in nats, for what the base decoded to, (B, C, S, S)."""
        output, images = output.float(), images.float()
        if self.reconstruction == "bce":
            errors = nn.functional.binary_cross_entropy_with_logits(output, images, reduction="none")
        else:
            pixels = output.sigmoid() if self.output == "logits" else output
            errors = (pixels - images).square() / (2 * GAUSSIAN_STANDARD_DEVIATION**2)
        return errors.flatten(1).sum(1)

    def penalty(self) -> Tensor | float:
        """Of the causal weights, a scalar."""
        if self.causal is None or not (self.group_penalty or self.l2_penalty):
            return 0.0
        effects = self.causal.effects()
        group = sum(group_norm(weight, self.causal.num_concepts) for weight in effects)
        squares = sum(weight.square().sum() for weight in effects)
        return self.group_penalty * group + self.l2_penalty * squares


def squared_means(mean: Tensor, context: Tensor) -> Tensor:
    """Return the squared norm of the coordinates' mean in the context of each sample, (B,), estimated from the batch.

    Exogenous coordinates have mean 0 in every context. What an intervention changes moves them, unless it is in the
    concept that is intervened on, whose posterior knows the context. So this keeps it there, from the first step on,
    where the KL divergence alone would let it settle anywhere.

    It is the mean product of two different samples (B, K, N) of a context, which is unbiased; 0 where there is only
    one. It never falls below 0, for batch norm lets an encoder make the samples of a batch cancel each other: a
    negative penalty would reward that, and outweigh the KL divergence where a batch has few samples of a context.
    """
    z_BR = mean.flatten(1)
    same_BB = (context[:, None] == context).all(-1).to(z_BR)
    count_B = same_BB.sum(1)
    products_B = (same_BB @ z_BR).square().sum(1) - same_BB @ z_BR.square().sum(1)
    return (products_B / (count_B * (count_B - 1)).clamp(min=1)).relu()


class TrainingMode(StepHooks):
    """End-to-end; frozen: only the context module learns; fine-tune: frozen for the first fifth of the run, then all.

    The fifth is that of the run as it began. Published causal weights are brought back to [0, 1] after every step.
    """

    def __init__(self, model: ContextAutoencoder, mode: str, begun_steps: int) -> None:
        self.model = model
        thawed = round(FROZEN_SHARE * begun_steps)
        self.frozen_steps = {"end-to-end": 0, "frozen": math.inf, "fine-tune": thawed}[mode]
        self._frozen: list[nn.Parameter] = []
        if mode == "frozen":
            self._frozen = [p for p in cast(nn.Module, model.backbone).parameters() if p.requires_grad]
            model.backbone.requires_grad_(False)
        self._freeze(self.frozen_steps > 0)

    def start_step(self, step: int) -> None:
        if self.model.backbone_is_frozen != (frozen := step < self.frozen_steps):
            self._freeze(frozen)

    def end_backward(self) -> None:
        # Rather than requires_grad=False: DDP does not learn of parameters that ask for gradients later.
        if self.model.backbone_is_frozen:
            for parameter in cast(nn.Module, self.model.backbone).parameters():
                parameter.grad = None

    def end_step(self) -> None:
        if isinstance(module := self.model.context_module, ContextModule):
            module.causal.after_step()

    def end(self) -> None:
        """Leave the model as a loaded one is: nothing is frozen, and it is in eval mode; another run may follow."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.model.backbone_is_frozen = False
        self.model.eval()

    def _freeze(self, frozen: bool) -> None:
        self.model.backbone_is_frozen = frozen
        self.model.train()


def bits_per_dimension(nats: float, base: Any) -> float:
    """(reconstruction + KL) / (S S ln 2), as the paper counts it: per pixel, not per channel."""
    return nats / (base.size**2 * math.log(2))
