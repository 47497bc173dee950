"""The paper's baselines, as losses of the same encoder and decoder; none of them is told what a context means.

Ada-GVAE is after Locatello et al., "Weakly-Supervised Disentanglement Without Compromises" (ICML 2020), BetaTCVAE after
Chen et al., "Isolating Sources of Disentanglement in Variational Autoencoders" (NeurIPS 2018), and TVAE after Ishfaq et
al., "TVAE: Triplet-Based Variational Autoencoder using Metric Learning" (2018). There is a topographic TVAE, too. These
three names are those that the library `disent` gives its weakly supervised, unsupervised and supervised method, and its
TVAE is the triplet one; a topographic one needs sequences of images, which there are none of here.

Shapes: B samples, K concepts, N noise width, R = K N coordinates.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hf_causal_context.context_module import Posterior
from hf_causal_context.training.autoencoder.objective import AutoencoderObjective, ImageBatch


class Baseline(AutoencoderObjective):
    """Reconstruction error + beta x KL divergence, from a posterior that may be changed, + a term of its own."""

    def __call__(self, model: Any, batch: ImageBatch) -> Tensor:
        """Losses (B,), one per sample."""
        posterior = self.posterior(
            model.context_module.encode(model.backbone.encode(batch.images), batch.context), batch
        )
        noise = posterior.sample(batch.generator)
        output = model.backbone.decode(model.context_module(noise, batch.context))
        losses = self.errors(output, batch.images) + self.beta * posterior.kl()
        return losses + self.extra(posterior, noise, batch)

    def posterior(self, posterior: Posterior, batch: ImageBatch) -> Posterior:
        """The posterior that samples are drawn from."""
        return posterior

    def extra(self, posterior: Posterior, noise: Tensor, batch: ImageBatch) -> Tensor | float:
        """What is added to the losses (B,)."""
        return 0.0


class AdaGVAE(Baseline):
    """An image and its partner, one observational and the other not, share the coordinates that differ least.

    Coordinate i counts as shared if KL(q_i || q'_i) is below the middle between its smallest and its largest value of
    all i; its two posteriors are then replaced by their average: means and variances, as in the group VAE.
    """

    def posterior(self, posterior: Posterior, batch: ImageBatch) -> Posterior:
        observational = (batch.context == 0).all(1)
        other = partners(observational[:, None] != observational)
        return averaged(posterior, Posterior(posterior.mean[other], posterior.log_variance[other]))


class BetaTCVAE(Baseline):
    """The total correlation of the coordinates counts six times: once within the KL divergence, and five times here."""

    weight = 6.0

    def extra(self, posterior: Posterior, noise: Tensor, batch: ImageBatch) -> Tensor:
        return (self.weight - 1) * total_correlation(posterior, noise)


class TVAE(Baseline):
    """Means of the posteriors are nearer to those of the same context than to those of another, by a margin.

    max(0, |mu - mu_same| - |mu - mu_other| + margin).
    """

    margin = 1.0

    def extra(self, posterior: Posterior, noise: Tensor, batch: ImageBatch) -> Tensor:
        same = (batch.context[:, None] == batch.context).all(-1)
        mean = posterior.mean.flatten(1)
        near, far = ((mean - mean[partners(allowed)]).square().sum(1) for allowed in (same, ~same))
        return (_root(near) - _root(far) + self.margin).relu()


BASELINES: dict[str, type[Baseline]] = {"Ada-GVAE": AdaGVAE, "BetaTCVAE": BetaTCVAE, "TVAE": TVAE}


def partners(allowed: Tensor) -> Tensor:
    """For every row of a batch (B, B) the next one that is allowed, in a circle, (B,); itself where none is."""
    rows = torch.arange(len(allowed), device=allowed.device)
    following = (rows[:, None] + rows + 1) % len(rows)  # ends with the row itself
    found = allowed.gather(1, following)
    found[:, -1] = True
    return following.gather(1, found.int().argmax(1, keepdim=True)).squeeze(1)


def averaged(posterior: Posterior, other: Posterior) -> Posterior:
    """Posteriors (B, K, N), in the coordinates that they share with the other ones replaced by the average of both."""
    variance, other_variance = posterior.log_variance.exp(), other.log_variance.exp()
    squares = (posterior.mean - other.mean).square()
    kl = 0.5 * ((variance + squares) / other_variance - 1 + other.log_variance - posterior.log_variance)
    smallest, largest = kl.flatten(1).aminmax(dim=1)
    shared = kl < 0.5 * (smallest + largest)[:, None, None]
    return Posterior(
        torch.where(shared, 0.5 * (posterior.mean + other.mean), posterior.mean),
        torch.where(shared, (0.5 * (variance + other_variance)).log(), posterior.log_variance),
    )


def total_correlation(posterior: Posterior, noise: Tensor) -> Tensor:
    """log q(z) - sum of log q(z_i) at the batch's own noise (B, K, N), minibatch-weighted: (B,) in nats.

    q is estimated by the mean over the batch's posteriors. That the batch stands for a whole data set adds a constant
    to the published estimate, which has no gradient and is left out.
    """
    mean, log_variance, z = (value.flatten(1) for value in (*posterior, noise))
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    log_q = normal.log_prob(z[:, None])  # (B, B, R): of every sample under every posterior
    return _log_mean(log_q.sum(2)) - _log_mean(log_q).sum(1)


def _log_mean(values: Tensor) -> Tensor:
    return values.logsumexp(1) - math.log(values.shape[1])


def _root(squares: Tensor) -> Tensor:
    # Its gradient at zero would be infinite: a row that is its own partner has that distance.
    return squares.clamp(min=1e-12).sqrt()
