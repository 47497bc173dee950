"""Losses against formulas written by hand, and noise that belongs to samples."""

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from hf_causal_context.bases.loading import as_base
from hf_causal_context.training.denoiser.objectives import Batch, denoising_objective
from hf_causal_context.training.noise import Draws

from .tiny_pipelines import PIPELINES, ddpm

IMAGES = (1, 16, 16)
SLOTS = (9, 11, 24)  # an early, a middle and a late time step


class Remembering(nn.Module):
    """A denoiser that predicts the same numbers for any input, and remembers what it was given."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, context, return_dict, **inputs):
        self.context, self.inputs = context, inputs
        return (self.prediction,)


def batch(shape=IMAGES, conditions=None):
    context = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    return Batch(torch.rand(3, *shape) * 2 - 1, context, conditions or {}, Draws(1, SLOTS))


def drawn(shape=IMAGES):
    """Time steps and noise of the batch."""
    draws = Draws(1, SLOTS)
    return draws.integers(1000), draws.normal(*shape)


class TestDraws:
    def test_the_noise_of_a_slot_does_not_depend_on_the_batch(self):
        together = Draws(3, range(8))
        expected = together.normal(2, 3), together.integers(1000), together.normal(4)
        for slots in (range(4, 8), [2], [7, 0, 3]):
            alone = Draws(3, slots)
            for actual, whole in zip(
                (alone.normal(2, 3), alone.integers(1000), alone.normal(4)), expected, strict=True
            ):
                assert torch.equal(actual, whole[list(slots)])

    def test_slots_seeds_and_calls_differ(self):
        draws = Draws(3, range(8))
        first, second, other = draws.normal(2), draws.normal(2), Draws(4, range(8)).normal(2)
        assert torch.cat([first, second, other]).unique().numel() == 48

    def test_global_random_state_is_neither_used_nor_changed(self):
        first, state = Draws(3, [0]).normal(2), torch.get_rng_state()
        assert torch.equal(Draws(3, [0]).normal(2), first)
        assert torch.equal(torch.get_rng_state(), state)

    def test_distributions(self):
        draws = Draws(0, range(2000))
        assert draws.integers(4).bincount().div(2000).sub(0.25).abs().max() < 0.05
        noise = draws.normal(10)
        assert noise.mean().abs() < 0.03
        assert abs(noise.std() - 1) < 0.03


def alphas():
    """Cumulative products of DDPM's linear schedule."""
    return torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def objective_for(prediction, snr_gamma=None, **scheduler):
    pipe = ddpm()
    pipe.scheduler = diffusers.DDPMScheduler(prediction_type=prediction, **scheduler)
    return denoising_objective(as_base(pipe), snr_gamma)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusion_losses_are_those_of_the_formulas(prediction, snr_gamma):
    given, (t, noise) = batch(), drawn()
    model = Remembering(torch.randn(3, *IMAGES))
    losses = objective_for(prediction, snr_gamma)(model, given)

    clean, noise = given.clean.double(), noise.double()
    alpha = alphas()[t]
    a, s = alpha.sqrt().view(-1, 1, 1, 1), (1 - alpha).sqrt().view(-1, 1, 1, 1)
    assert torch.equal(model.inputs["timestep"], t)
    assert torch.equal(model.context, given.context)
    torch.testing.assert_close(model.inputs["sample"].double(), a * clean + s * noise, rtol=1e-5, atol=1e-5)
    target = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[prediction]
    expected = (model.prediction.double() - target).square().mean((1, 2, 3))
    if snr_gamma is not None:
        snr = alpha / (1 - alpha)
        # In terms of the clean image the weight is min(SNR, gamma); an error of epsilon is SNR times that of the
        # image, and one of v is SNR + 1 times.
        per_unit = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction]
        expected = expected * snr.clamp(max=snr_gamma) / per_unit
        assert (snr > snr_gamma).any()
        assert (snr < snr_gamma).any()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)


def test_min_snr_weights_are_finite_where_the_signal_is_gone():
    objective = objective_for("v_prediction", 5.0, rescale_betas_zero_snr=True)
    weights = objective._weights(torch.arange(1000))
    assert weights.isfinite().all()
    assert weights[-1] < 1e-6


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_flow_matching_losses_are_those_of_the_formulas(name):
    base = as_base(PIPELINES[name]())
    given = batch((4, 8, 8), base.encode_captions(["a", "b", "c"]))
    prediction = torch.randn(3, 4, 8, 8)
    shift = 3.0 if name == "stable_diffusion_3" else 1.0
    seen = {}

    def predict(model, noisy, timesteps, conditions, context):
        seen.update(noisy=noisy, timesteps=timesteps)
        return prediction

    base.predict = predict
    losses = denoising_objective(base)(base.denoiser, given)

    draws = Draws(1, SLOTS)
    u = torch.sigmoid(draws.normal())  # logit-normal
    noise = draws.normal(4, 8, 8)
    sigma = (1000 - (u * 1000).floor()) / 1000  # the schedule's grid, from 1 down to 1 / 1000
    sigma = (shift * sigma / (1 + (shift - 1) * sigma)).view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"], (1 - sigma) * given.clean + sigma * noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["timesteps"], 1000 * sigma.flatten(), rtol=1e-5, atol=1e-3)
    expected = (prediction - (noise - given.clean)).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_min_snr_weighting_of_a_flow_is_an_error():
    with pytest.raises(ValueError, match="--snr_gamma weights diffusion schedules; .* flow matching. Leave it out"):
        denoising_objective(as_base(PIPELINES["flux"]()), 5.0)
