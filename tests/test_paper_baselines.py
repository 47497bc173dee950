"""The losses of the paper's baselines against values computed by hand, and what each of them does to a model."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from examples.paper.baselines import BASELINES, AdaGVAE, BetaTCVAE, averaged, partners, total_correlation
from hf_causal_context.context_module import Posterior
from hf_causal_context.models import ContextAutoencoder
from hf_causal_context.training.autoencoder.objective import AutoencoderObjective, ImageBatch


def posterior(means, variances):
    """Of one concept: (B, 1, N)."""
    return Posterior(torch.tensor(means)[:, None], torch.tensor(variances).log()[:, None])


def batch(contexts, side=16):
    images = torch.rand(len(contexts), 1, side, side, generator=torch.Generator().manual_seed(0))
    return ImageBatch(images, torch.tensor(contexts), torch.Generator().manual_seed(1))


OBS, DARK, TALL = [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]


def test_partners_are_the_next_allowed_rows_in_a_circle():
    same = torch.tensor(
        [[True, False, True, False], [False] * 4, [True, False, True, True], [False, True, False, True]]
    )
    assert partners(same).tolist() == [2, 1, 3, 1]  # row 1 has none, so it is its own


def test_ada_gvae_averages_the_coordinates_below_the_middle_of_the_divergences():
    # KL divergences from N(0, 1), N(0, 1), N(0, 1) to N(2, 1), N(0, 4), N(1, 1): 2, (1/4 - 1 + log 4) / 2 = 0.318, 0.5.
    # The middle of 0.318 and 2 is 1.159: the first coordinate stays.
    one, other = posterior([[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]), posterior([[2.0, 0.0, 1.0]], [[1.0, 4.0, 1.0]])
    result = averaged(one, other)
    assert result.mean[0, 0].tolist() == pytest.approx([0, 0, 0.5])
    assert result.log_variance.exp()[0, 0].tolist() == pytest.approx([1, 2.5, 1])
    # With itself nothing differs, and nothing changes.
    assert torch.equal(averaged(other, other).mean, other.mean)


def test_ada_gvae_pairs_observational_images_with_the_others():
    start = posterior([[0.0, 0.0], [8.0, 1.0], [8.0, 2.0], [0.0, 3.0]], [[1.0, 1.0]] * 4)
    model = ContextAutoencoder(("dark", "tall"), {"class": "LightweightVAE", "size": 16, "channels": 1})
    shared = AdaGVAE(model).posterior(start, batch([OBS, DARK, TALL, OBS]))
    # Row 0 with 1, 1 with 3, 2 with 3, 3 with 1; the first coordinate, 8 apart, is the one that differs.
    assert shared.mean[:, 0].tolist() == [[0, 0.5], [8, 2], [8, 2.5], [0, 2]]


def test_total_correlation_of_two_posteriors_by_hand():
    # Two rows, two coordinates, unit variances, means (0, 0) and (a, a), noise at the means. With p = exp(-a^2 / 2), in
    # units of the density's maximum: q(z) = (1 + p^2) / 2, q(z_i) = (1 + p) / 2.
    a = 1.5
    p = math.exp(-(a**2) / 2)
    values = posterior([[0.0, 0.0], [a, a]], [[1.0, 1.0], [1.0, 1.0]])
    expected = math.log((1 + p**2) / 2) - 2 * math.log((1 + p) / 2)
    assert total_correlation(values, values.mean).tolist() == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_total_correlation_of_many_rows_is_that_of_their_distribution(correlation):
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])
    means = MultivariateNormal(torch.zeros(2), covariance * 0.9).sample((3000,))
    values = Posterior(means[:, None], torch.full((3000, 1, 2), math.log(0.1)))
    noise = values.sample(torch.Generator().manual_seed(1))
    total = covariance * 0.9 + 0.1 * torch.eye(2)
    expected = -0.5 * float(torch.logdet(total))
    assert float(total_correlation(values, noise).mean()) == pytest.approx(expected, abs=0.03)


def test_beta_tcvae_is_the_decomposition_of_chen():
    # KL = mutual information + total correlation + KL of each coordinate; the loss weighs the second of them by 6.
    values = posterior([[0.0, 1.0], [2.0, -1.0], [0.5, 0.0]], [[0.5, 1.0], [0.2, 0.3], [1.0, 2.0]])
    noise = values.mean + 0.3
    mean, deviation = values.mean.flatten(1), (0.5 * values.log_variance).exp().flatten(1)
    z = noise.flatten(1)
    density = Normal(mean, deviation).log_prob(z[:, None]).exp()
    joint, single, own = density.prod(2).mean(1), density.mean(1), density[range(3), range(3)].prod(1)
    prior = Normal(0.0, 1.0).log_prob(z).exp()
    information, correlation = (own / joint).log(), (joint / single.prod(1)).log()
    rest = (single / prior).prod(1).log()
    model = ContextAutoencoder(("dark", "tall"), {"class": "LightweightVAE", "size": 16, "channels": 1})
    extra = BetaTCVAE(model).extra(values, noise, batch([OBS] * 3))
    sampled_kl = (own / prior.prod(1)).log()
    torch.testing.assert_close(sampled_kl + extra, information + 6 * correlation + rest)


def test_tvae_is_a_triplet_loss_of_posterior_means():
    # Rows 0 and 1 share a context, row 2 has another: near 5, far 1; near 5, far |(3, 4) - (0, 1)| = 4.243.
    values = posterior([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], [[1.0, 1.0]] * 3)
    model = ContextAutoencoder(("dark", "tall"), {"class": "LightweightVAE", "size": 16, "channels": 1})
    extra = BASELINES["TVAE"](model).extra(values, values.mean, batch([OBS, OBS, DARK]))
    # Row 2 is the only one of its context: near 0, far 1 (row 0, the next in a circle), margin 1.
    assert extra.tolist() == pytest.approx([5 - 1 + 1, 5 - 18**0.5 + 1, 0], abs=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_without_its_own_term_a_baseline_is_the_plain_autoencoder(name, monkeypatch):
    torch.manual_seed(0)
    base = {"class": "LightweightVAE", "size": 16, "channels": 1}
    model = ContextAutoencoder(("dark", "tall"), base, with_context_module=False).eval()
    torch.nn.init.normal_(model.context_module.mean.weight)  # so that posteriors differ
    objective, plain = BASELINES[name](model, beta=3), AutoencoderObjective(model, beta=3)
    contexts = [OBS, OBS, DARK, TALL]
    with_term = objective(model, batch(contexts))
    assert not torch.allclose(with_term, plain(model, batch(contexts)))
    monkeypatch.setattr(type(objective), "posterior", lambda self, posterior, batch: posterior)
    monkeypatch.setattr(type(objective), "extra", lambda *_: 0.0)
    torch.testing.assert_close(objective(model, batch(contexts)), plain(model, batch(contexts)))
    with_term.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
