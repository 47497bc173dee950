"""How far a diffusion base is from the observational set, measured on bases whose answer is known."""

import diffusers
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from hf_causal_context import CausalContextConfig
from hf_causal_context.bases.gap import FAR, NEAR
from hf_causal_context.bases.loading import as_base, load_base
from hf_causal_context.data.worlds.digits import sample_digits
from hf_causal_context.quickstart import BASE
from hf_causal_context.training.denoiser.gap import LEVELS, NUM_INFERENCE_STEPS, NUM_ROWS, denoiser_gap, own_samples
from hf_causal_context.training.denoiser.objectives import Batch
from hf_causal_context.training.noise import Draws

from .tiny_pipelines import EVERY, ddpm, side, stable_diffusion_3


def rows(clean, conditions=None):
    return Batch(clean, torch.zeros(len(clean), 0), conditions or {}, Draws(0, range(len(clean))))


class Gaussian(nn.Module):
    """The best denoiser there is of pixels that are independent and normal, with mean 0 and deviation `deviation`."""

    def __init__(self, deviation, scheduler, prediction):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(()))
        self.deviation, self.scheduler, self.prediction = deviation, scheduler, prediction

    def forward(self, timestep, return_dict, sample=None, hidden_states=None, **conditions):
        if self.prediction == "flow":
            sigma = (timestep / 1000).view(-1, 1, 1, 1)
            variance = ((1 - sigma) * self.deviation) ** 2 + sigma**2
            return ((sigma - (1 - sigma) * self.deviation**2) / variance * hidden_states,)
        a = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        variance = a * self.deviation**2 + 1 - a
        clean, noise = a.sqrt() * self.deviation**2 / variance * sample, (1 - a).sqrt() / variance * sample
        by_prediction = {"epsilon": noise, "sample": clean, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}
        return (by_prediction[self.prediction],)


def gaussian(prediction, deviation=0.2):
    pipe = stable_diffusion_3() if prediction == "flow" else ddpm()
    if prediction != "flow":
        pipe.scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    base = as_base(pipe)
    base.denoiser = Gaussian(deviation, base.noise_scheduler(), prediction)
    return base


PREDICTIONS = ["epsilon", "v_prediction", "sample", "flow"]


class TestWithAKnownAnswer:
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_data_that_the_base_makes_is_near_and_other_data_is_far(self, prediction):
        base = gaussian(prediction)
        draws = torch.randn(32, base.in_channels, 16, 16)
        assert denoiser_gap(base, rows(0.2 * draws), 0).times == pytest.approx(1, abs=0.1)
        assert denoiser_gap(base, rows(0.2 * draws + 0.5), 0).times > FAR
        assert denoiser_gap(base, rows(0.6 * draws), 0).times > FAR
        assert denoiser_gap(base, rows(0 * draws), 0).times < 1 / NEAR

    def test_the_number_is_the_same_whatever_the_base_predicts(self):
        clean = 0.3 * torch.randn(32, 1, 16, 16)
        times = [denoiser_gap(gaussian(prediction), rows(clean), 0).times for prediction in PREDICTIONS[:3]]
        assert times == pytest.approx([times[0]] * 3, rel=1e-2)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_own_samples_are_what_the_base_makes(self, prediction):
        base = gaussian(prediction)
        batch = rows(torch.zeros(64, base.in_channels, 16, 16))
        samples = own_samples(base, base.denoiser, batch)
        assert samples.mean() == pytest.approx(0, abs=0.01)
        assert samples.std() == pytest.approx(0.2, rel=0.1)

    def test_it_is_nearly_the_same_for_other_seeds_and_other_rows(self):
        base = gaussian("epsilon")
        times = [denoiser_gap(base, rows(0.5 * torch.randn(32, 1, 16, 16)), seed).times for seed in range(4)]
        assert max(times) < 1.1 * min(times)


@pytest.mark.parametrize("name", EVERY)
def test_the_bare_base_of_every_family_is_measured_and_nothing_is_disturbed(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    base.denoiser.train()
    pixels = torch.rand(10, base.image_channels, side(base), side(base)) * 2 - 1
    conditions = {"class_labels": torch.arange(10) % 5} if base.takes_classes else {}
    if base.takes_captions:
        conditions = base.encode_captions([f"a {i % 3}" for i in range(10)])
    data = rows(base.encode_images(pixels), conditions)
    calls = []
    base.denoiser.register_forward_hook(lambda module, args, output: calls.append(module.training))
    weights = {key: tensor.clone() for key, tensor in base.denoiser.state_dict().items()}
    before = torch.get_rng_state()
    gap = denoiser_gap(base, data, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in base.denoiser.state_dict().items())
    assert base.denoiser.training
    assert calls == [False] * 2 * (NUM_INFERENCE_STEPS + 2 * len(LEVELS))  # ten rows are two batches
    assert 0 < gap.factor < float("inf")
    assert gap.rows == 10

    get_peft_model(base.denoiser, CausalContextConfig(concepts=("thick",), init_weights=False))
    assert denoiser_gap(base, data, 0) == gap  # the adapter has no part in it


def letters(num):
    """Letters in PIL's own font."""
    images = []
    for i in range(num):
        image = Image.new("L", (32, 32))
        font = ImageFont.load_default(size=20 + i % 5)
        ImageDraw.Draw(image).text((16, 16), chr(65 + i % 26), fill=255, font=font, anchor="mm")
        images.append(np.asarray(image))
    return np.stack(images)


@pytest.mark.slow
def test_the_packaged_base_is_near_its_digits_and_far_from_letters():
    base = load_base(str(BASE))
    near, far = (
        denoiser_gap(base, rows(torch.from_numpy(images)[:, None].float() / 127.5 - 1), 0)
        for images in (sample_digits(NUM_ROWS, seed=1)[0], letters(NUM_ROWS))
    )
    assert near.factor < NEAR
    assert far.times > FAR
