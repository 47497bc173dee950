"""Counterfactuals: the inversion holds for every family, and the edit is the sampler's own."""

import copy
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from hf_causal_context import CausalContextConfig, counterfactual, intervene
from hf_causal_context.adapter.lookup import conditionings
from hf_causal_context.bases.loading import as_base
from hf_causal_context.inference.counterfactuals import Sampler, _Step

from .training.packing import NO_GUIDANCE, STATIC, noise_argument, unpacked
from .training.tiny_pipelines import EVERY, JOINED, PIPELINES, SLOWLY, side

CONCEPTS = ("thick", "slant")
STEPS = 4
# The layers that denoisers end in, where they have names of their own.
LAST = {
    "dit": "proj_out_2",
    "z_image": "all_final_layer.2-1.linear",
    **dict.fromkeys(("krea2", "hidream_image"), "final_layer.linear"),
    "lumina2": "norm_out.linear_2",
}


def build(name, **kwargs):
    """A base with a random adapter; smooth, as trained denoisers are, so that a step can be inverted."""
    torch.manual_seed(0)
    pipe = PIPELINES[name](**kwargs)
    if hasattr(pipe, "vae"):
        pipe.vae.register_to_config(scaling_factor=3.0)  # latents of about unit variance, which denoisers expect
    if name == "ddim":  # a random network is no denoiser, so it cannot predict samples
        pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    base = as_base(pipe)
    with torch.no_grad():
        last = LAST.get(name, "conv_out" if base.denoiser_name == "unet" else "proj_out")
        for parameter in base.denoiser.get_submodule(last).parameters():
            parameter *= 0.05 if base.denoiser_name == "unet" else 0.2
    options = {"concepts": CONCEPTS, "target_modules": "all-linear", "init_weights": False, "alpha": 0.3}
    options["observational_rank"] = 0  # a random one draws what cannot be inverted
    options["exclude_modules"] = JOINED.get(type(base.denoiser).__name__)
    get_peft_model(base.denoiser, CausalContextConfig(**options))
    base.denoiser.eval()
    base.pipe.set_progress_bar_config(disable=True)
    return base


def conditions(base):
    given = {"class_label": 2} if base.takes_classes else {}
    return given | ({"prompt": "a cat"} if base.takes_captions else {})


def images(base, rows=2):
    return torch.rand(rows, base.image_channels, side(base), side(base), generator=torch.Generator().manual_seed(1))


def edit(base, image, *args, **kwargs):
    return counterfactual(base, image, *args, num_inference_steps=STEPS, **conditions(base), **kwargs)


@pytest.mark.parametrize("name", EVERY)
def test_the_inversion_holds(name):
    base = build(name)
    image = images(base)
    result = edit(base, image, "thick", strengths=[0.0, 0.5, 1.0])
    assert result.images.shape == (3, *image.shape)
    assert (result.reconstruction_error < 2e-3).all()
    shown = base.decode_images(base.encode_images(2 * image - 1))
    torch.testing.assert_close(result.reconstruction, shown, rtol=0, atol=5e-3)
    torch.testing.assert_close(result.images[0], result.reconstruction, rtol=1e-4, atol=1e-4)
    changes = [(image - result.reconstruction).abs().max() for image in result.images]
    assert changes[2] > changes[1] > 3e-4


@pytest.mark.parametrize("name", ["ddim", "dit", "stable_diffusion", "stable_diffusion_3"])
def test_rows_and_strengths_are_independent(name):
    base = build(name)
    image = images(base)
    together = edit(base, image, {"thick": 1.0, "slant": -0.5}, "slant", strengths=[1.0, 2.0])
    for row in range(2):
        alone = edit(base, image[row : row + 1], {"thick": 2.0, "slant": -2.0}, "slant")
        torch.testing.assert_close(together.images[1, row], alone.images[0, 0], rtol=1e-3, atol=2e-3)


def test_back_again():
    base = build("ddim")
    image = images(base)
    there = edit(base, image, "thick")
    inside = ((there.images[0] > 0) & (there.images[0] < 1)).all()
    back = edit(base, there.images[0], (), "thick")
    if inside:  # else clipping lost something
        torch.testing.assert_close(back.images[0], image, rtol=0, atol=5e-3)
    torch.testing.assert_close(back.noise, there.noise, rtol=0, atol=0.5)


@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_the_inversion_of_gaussian_data_is_the_known_one(variance):
    """Data N(0, v): the best e(x') is sigma x' / (alpha^2 v + sigma^2), so a step backwards is a division."""
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    grid = Sampler(build("ddpm"), 20, None, None)._grid(x)
    found, known = x, x
    for step in grid:
        slope = step.sigma / (step.alpha**2 * variance + step.sigma**2)
        found = step.backward(found, lambda y, slope=slope: slope * y)
        known = step.ratio * known / (1 - step.slope * slope)
    torch.testing.assert_close(found, known, rtol=5e-3, atol=5e-3)
    for step in reversed(grid):
        slope = step.sigma / (step.alpha**2 * variance + step.sigma**2)
        known = step.forward(known, slope * known)
    torch.testing.assert_close(known, x, rtol=1e-4, atol=1e-4)


def test_a_step_that_does_not_contract_is_damped_in_its_own_rows():
    step = _Step(1.0, 1.0, 1.0, 1.0, 1.0)
    slopes = torch.tensor([0.1, -1.5]).view(2, 1, 1, 1)  # undamped, |slope| > 1 explodes
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = step.backward(x, lambda y: slopes * y)
    torch.testing.assert_close(found, x / (1 - slopes), rtol=0, atol=5e-3)
    torch.testing.assert_close(found[:1], step.backward(x[:1], lambda y: slopes[:1] * y), rtol=0, atol=0)


def test_abduction_knows_the_context_of_the_image():
    base = build("ddim")
    image = images(base)
    result = edit(base, image, (), {"thick": 5.0, "slant": -5.0})
    changed = (result.images[0] - image).square().flatten(1).mean(1).sqrt()
    assert (result.reconstruction_error < 0.2 * changed).all()


def test_calibrated_strengths_are_those_that_are_meant_by_every_part():
    base = build("stable_diffusion")
    part = CausalContextConfig(concepts=CONCEPTS, target_modules=["q_proj", "v_proj"], init_weights=False)
    get_peft_model(base.pipe.text_encoder, part).eval()
    for owner in conditionings(base.pipe):
        owner.calibrations["default"] = {name: [[0, 0], [0.5, 0.25], [1, 1]] for name in CONCEPTS}
    image = images(base, 1)
    dialled = edit(base, image, "thick", {"slant": 0.5}, strengths=[0.0, 0.5, 1.0], calibrated=True)
    for number, meant in enumerate(({"slant": 0.25}, {"thick": 0.25, "slant": 0.125}, "thick")):
        expected = edit(base, image, meant, {"slant": 0.25})
        torch.testing.assert_close(dialled.images[number], expected.images[0], rtol=1e-4, atol=5e-5)
        assert (number == 0) == torch.allclose(dialled.images[number], dialled.images[0], atol=1e-4)


def test_prediction_is_the_pipelines_own_sampler():
    base = build("ddim")
    scheduler = base.pipe.scheduler
    result = edit(base, images(base), "thick")
    scheduler.set_timesteps(STEPS)
    x = result.noise
    with torch.no_grad(), intervene(base.pipe, "thick"):
        for t in scheduler.timesteps:
            x = scheduler.step(base.denoiser(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(result.images[0], (x / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", *SLOWLY])
def test_flow_prediction_is_the_pipelines_own_sampler(name):
    base = build(name)
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 1.5}
    shift = {"shift": 3.0} if name in STATIC else dynamic
    base.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shift)
    result = edit(base, images(base, 1), "thick")
    ended = {}
    options = base.stock_call(prompt="a cat", resolution=side(base))
    if base.takes_guidance:
        options |= base.guidance_options(NO_GUIDANCE.get(name, 1.0))
    else:
        cast(Any, base.pipe).guider = None
    options |= {"latents": noise_argument(name, result.noise), "output_type": "latent", "num_inference_steps": STEPS}
    with intervene(base.pipe, "thick"):
        cast(Any, base.pipe)(callback_on_step_end=lambda *args: ended.update(args[-1]) or {}, **options)
    latents = unpacked(name, ended["latents"])
    torch.testing.assert_close(result.images[0], base.decode_images(latents), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion"])
def test_outside_the_mask_nothing_changes(name):
    base = build(name)
    image = images(base)
    mask = torch.zeros(16, 16)
    mask[:, 8:] = 1
    result = edit(base, image, "thick+slant", mask=mask)
    assert torch.equal(result.images[0, ..., :8], image[..., :8])
    assert (result.images[0] - image)[..., 8:].abs().max() > 1e-3
    drawn = Image.fromarray((255 * mask).byte().numpy())
    assert torch.equal(edit(base, image, "thick+slant", mask=drawn).images, result.images)


def test_pil_images_are_read_as_in_training():
    base = build("ddpm")
    image = Image.new("RGB", (40, 20), (10, 200, 30))
    result = edit(base, image, "thick")
    assert result.images.shape == (1, 1, 1, 16, 16)
    assert abs(result.reconstruction.mean() - np.asarray(image.convert("L")).mean() / 255) < 0.01
    assert edit(base, [image, image], "thick").images.shape == (1, 2, 1, 16, 16)


def test_the_pipeline_is_left_as_it_was():
    base = build("ddim")
    base.denoiser.train()
    before = copy.deepcopy(base.pipe.scheduler.__dict__)
    edit(base, images(base), "thick")
    assert base.denoiser.training
    assert base.pipe.scheduler.__dict__.keys() == before.keys()
    assert type(base.pipe) is diffusers.DDIMPipeline


def test_bfloat16():
    base = build("stable_diffusion")
    base.pipe.to(torch.bfloat16)
    result = edit(base, images(base), "thick")
    assert result.images.dtype == torch.float32
    assert (result.reconstruction_error < 0.05).all()


def test_half_precision_autoencoders_decode_in_single():
    base = build("stable_diffusion_xl", latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    image = images(base)
    latents = base.encode_images(2 * image - 1)
    expected = base.decode_images(latents)
    base.pipe.vae.half()
    torch.testing.assert_close(base.decode_images(latents), expected, rtol=0, atol=5e-3)
    assert base.pipe.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to_context": "dark"}, ValueError, "Unknown concept 'dark'"),
        ({"from_context": "dark"}, ValueError, "Unknown concept 'dark'"),
        ({"strengths": []}, ValueError, r"strengths=\[\] must be one or more finite numbers"),
        ({"strengths": [float("nan")]}, ValueError, "must be one or more finite numbers"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0 must be at least 1"),
        ({"image": torch.rand(1, 3, 8, 8)}, ValueError, "image has 8 x 8 pixels, and DDIMPipeline generates 16 x 16"),
        ({"image": torch.rand(1, 1, 16, 16)}, ValueError, "do not fit the base: it takes .rows, 3, height, width"),
        (
            {"image": torch.full((1, 3, 16, 16), 2.0)},
            ValueError,
            r"with values from 2 to 2. Pass floats .* in \[0, 1\]",
        ),
        ({"image": torch.full((1, 3, 16, 16), torch.nan)}, ValueError, r"Pass floats \(B, C, H, W\) in \[0, 1\]"),
        ({"image": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, ValueError, "type torch.uint8"),
        ({"image": torch.zeros(0, 3, 16, 16)}, ValueError, "with values none. Pass floats"),
        ({"image": []}, TypeError, "is no image. Pass a PIL image"),
        ({"image": ["cat.png"]}, TypeError, "is no image. Pass a PIL image"),
        ({"mask": torch.zeros(8, 8)}, ValueError, r"mask has shape \(8, 8\).*Pass \(16, 16\) in \[0, 1\]"),
        ({"prompt": "a cat"}, ValueError, "takes no captions"),
        ({"class_label": 1}, ValueError, "has no classes"),
    ],
)
def test_refusals(arguments, error, message):
    base = build("ddim")
    base.denoiser.forward = lambda *args, **kwargs: pytest.fail("work was done")
    given = {"image": images(base), "to_context": "thick", "num_inference_steps": 2} | arguments
    with pytest.raises(error, match=message):
        counterfactual(base, **given)


def test_a_sampler_without_a_step_that_can_be_inverted():
    base = build("ddim")
    options = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}
    base.pipe.scheduler = diffusers.DDIMScheduler(**options)
    with pytest.raises(ValueError, match="num_inference_steps=1 leads from pure noise .* Use more"):
        counterfactual(base, images(base), "thick", num_inference_steps=1)


def test_a_base_without_an_adapter():
    base = as_base(PIPELINES["ddim"]())
    with pytest.raises(ValueError, match="No component of DDIMPipeline has a causal context adapter"):
        edit(base, torch.rand(1, 3, 16, 16), "thick")
    with pytest.raises(ValueError, match="class_label=None, but this base is conditioned on classes"):
        counterfactual(build("ddpm_classes"), torch.rand(1, 1, 16, 16), "thick")
