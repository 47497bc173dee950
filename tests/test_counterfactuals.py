"""Counterfactuals: without a change the image comes back from every family, and the edit is the sampler's own."""

import copy
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from examples.benchmarks.counterfactual_limits import IdealSampler
from hf_causal_context import CausalContextConfig, Context, counterfactual, intervene
from hf_causal_context.adapter.lookup import conditionings
from hf_causal_context.bases.loading import as_base
from hf_causal_context.inference.counterfactuals import Sampler

from .training.packing import NO_GUIDANCE, STATIC, noise_argument, step_latents, unpacked
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
    """A base with a random adapter."""
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
    options["observational_rank"] = 0
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
def test_without_a_change_the_image_comes_back(name):
    base = build(name)
    image = images(base)
    result = edit(base, image, "thick", strengths=[0.0, 0.5, 1.0])
    assert result.images.shape == (3, *image.shape)
    assert result.noise.shape[1] == len(result.reconstruction) == 2
    shown = base.decode_images(base.encode_images(2 * image - 1))
    torch.testing.assert_close(result.images[0], shown, rtol=0, atol=2e-3)
    changes = [(shown - made).abs().max() for made in result.images]
    assert changes[2] > changes[1] > 3e-4


@pytest.mark.parametrize("name", ["ddim", "dit", "stable_diffusion", "stable_diffusion_3"])
def test_rows_and_strengths_are_independent(name):
    base = build(name)
    image = images(base)
    together = edit(base, image, {"thick": 1.0, "slant": -0.5}, "slant", strengths=[1.0, 2.0])
    for row in range(2):
        alone = edit(base, image[row : row + 1], {"thick": 2.0, "slant": -2.0}, "slant")
        torch.testing.assert_close(together.images[1, row], alone.images[0, 0], rtol=1e-3, atol=2e-3)


def test_ten_edits_that_change_nothing_leave_the_image():
    base = build("ddim")
    image = given = images(base)
    for _ in range(10):
        image = edit(base, image, {"thick": 5.0}, {"thick": 5.0}).images[0]
    torch.testing.assert_close(image, given, rtol=0, atol=1e-4)
    assert (edit(base, given, (), {"thick": 5.0}).images[0] - given).abs().max() > 1e-2


@pytest.mark.parametrize("variance", [0.25, 4.0])
@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion_3"])
def test_a_shift_of_gaussian_data_is_found_exactly(name, variance, monkeypatch):
    """Data N(m, v) -> N(m', v): the counterfactual of x is x + m' - m."""
    sampler = Sampler(build(name), 20, *((None, None) if name == "ddpm" else ("a cat", None)))
    x = 0.3 * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = 0.0

    def predict(self, noisy, step, conditions):
        gain = step.alpha * variance / (step.alpha**2 * variance + step.sigma**2)
        return mean + gain * (noisy - step.alpha * mean)

    monkeypatch.setattr(Sampler, "predict_clean", predict)
    monkeypatch.setattr(Sampler, "_conditions", lambda *args: {})
    found = sampler.backward(x, Context())
    torch.testing.assert_close(sampler.forward(found, [Context()]), x, rtol=0, atol=1e-5)
    mean = 0.7
    first = sampler.grid(x)[0]
    left = first.alpha * 0.7 * variance * first.alpha / (first.alpha**2 * variance + first.sigma**2)  # not pure noise
    torch.testing.assert_close(sampler.forward(found, [Context()]), x + 0.7, rtol=0, atol=1e-3 + left)


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


def start(base, image):
    """Where the sampler starts: the image in noise that is always the same."""
    sampler = Sampler(base, STEPS, conditions(base).get("prompt"), conditions(base).get("class_label"))
    with torch.no_grad():
        clean = base.encode_images(2 * image - 1)
    noise = torch.randn((STEPS, *clean.shape[1:]), generator=torch.Generator().manual_seed(0))[0]
    first = sampler.grid(clean)[0]
    return first.alpha * clean + first.sigma * noise


def test_prediction_is_the_pipelines_own_stochastic_sampler():
    base = build("ddim")
    scheduler = base.pipe.scheduler
    image = images(base)
    result = edit(base, image, "thick")
    scheduler.set_timesteps(STEPS)
    x = start(base, image)
    with torch.no_grad(), intervene(base.pipe, "thick"):
        for t, noise in zip(scheduler.timesteps, result.noise, strict=True):
            x = scheduler.step(base.denoiser(x, t).sample, t, x, eta=1.0, variance_noise=noise).prev_sample
    x += result.noise[-1]  # in the last step, that sampler adds no noise
    torch.testing.assert_close(result.images[0], (x / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", *SLOWLY])
def test_flow_prediction_is_the_pipelines_own(name):
    """The pipeline's steps say what its velocity was; the noise maps are added to the means that follow."""
    base = build(name)
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 1.5}
    shift = {"shift": 3.0} if name in STATIC else dynamic
    base.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**shift)
    image = images(base, 1)
    result = edit(base, image, "thick")
    x = start(base, image)
    options = base.stock_call(prompt="a cat", resolution=side(base))
    if base.takes_guidance:
        options |= base.guidance_options(NO_GUIDANCE.get(name, 1.0))
    else:
        cast(Any, base.pipe).guider = None

    def with_noise(pipe, number, time, given):
        nonlocal x
        s, t = (float(pipe.scheduler.sigmas[number + i]) for i in (1, 0))
        clean = x - t * (unpacked(name, given["latents"]) - x) / (s - t)
        kept = (1 - t) * s / ((1 - s) * t)
        deviation = s * (1 - kept**2) ** 0.5 or 1.0
        x = (1 - s) * clean + s * kept * (x - (1 - t) * clean) / t + deviation * result.noise[number]
        return {"latents": step_latents(name, x)}

    options |= {"latents": noise_argument(name, x), "output_type": "latent", "num_inference_steps": STEPS}
    with intervene(base.pipe, "thick"):
        cast(Any, base.pipe)(callback_on_step_end=with_noise, **options)
    torch.testing.assert_close(result.images[0], base.decode_images(x), rtol=1e-3, atol=1e-3)


def test_the_reconstruction_is_what_the_base_makes_of_the_image_in_some_noise(monkeypatch):
    base = build("ddim")
    image = 0.25 + images(base) / 2
    offsets = []

    def predict(self, noisy, step, conditions):
        offsets.append((step.sigma, 0.3 * step.sigma))
        return 2 * image - 1 + 0.3 * step.sigma

    monkeypatch.setattr(Sampler, "predict_clean", predict)
    result = counterfactual(base, image, (), num_inference_steps=25)
    _, offset = min(offset for offset in offsets if offset[0] > 0.15)
    torch.testing.assert_close(result.reconstruction, image + offset / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.reconstruction_error, torch.full((2,), offset / 2), rtol=1e-4, atol=1e-5)


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


def test_a_mask_has_the_shape_of_the_images_or_of_what_is_kept_of_them(monkeypatch):
    base, wide = build("ddim"), Image.new("RGB", (40, 20))
    half = {size: Image.new("L", size) for size in ((40, 20), (20, 20), (201, 100), (20, 40))}
    for (width, height), mask in half.items():
        mask.paste(255, (width // 2, 0, width, height))
    turned = Image.new("RGB", (20, 40))
    turned.getexif()[0x0112] = 6  # is 40 x 20
    by_size = [edit(base, [wide, turned], "thick", mask=half[size]).images for size in ((40, 20), (20, 20), (201, 100))]
    assert all((images - by_size[0]).abs().max() < 0.1 for images in by_size)
    square = Image.new("RGB", (16, 16))
    monkeypatch.setattr(base.denoiser, "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    for image, mask in ((wide, (20, 40)), ([wide, square], (40, 20)), (torch.rand(1, 3, 16, 16), (40, 20))):
        with pytest.raises(ValueError, match=r"mask has \d+ x \d+ pixels, and an image \d+ x \d+, .* another shape"):
            edit(base, image, "thick", mask=half[mask])


def test_pil_images_are_read_as_in_training():
    base = build("ddpm")
    image = Image.new("RGB", (40, 20), (10, 200, 30))
    result = edit(base, image, ())
    assert result.images.shape == (1, 1, 1, 16, 16)
    assert abs(result.images.mean() - np.asarray(image.convert("L")).mean() / 255) < 0.01
    assert edit(base, [image, image], "thick").images.shape == (1, 2, 1, 16, 16)


def test_the_truth_in_the_adapters_place_makes_edits_exact():
    base = build("ddpm")
    factual, true = images(base).chunk(2)
    context = Context("thick")
    sampler = IdealSampler(base, STEPS, factual)
    exact = sampler.edit(context, true, lambda noise: True)
    torch.testing.assert_close(exact, true, rtol=0, atol=1e-5)
    as_it_is = sampler.edit(context, true, lambda noise: False)
    torch.testing.assert_close(as_it_is, edit(base, factual, context).images[0], rtol=0, atol=1e-4)
    assert (as_it_is - exact).abs().max() > 0.01


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
    image = images(base)
    result = edit(base, image, ())
    assert result.images.dtype == torch.float32
    shown = base.decode_images(base.encode_images(2 * image - 1)).float()
    assert (result.images[0] - shown).square().mean().sqrt() < 0.05


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
        ({"strengths": 0.5}, ValueError, "strengths=0.5 must be one or more finite numbers, such as"),
        ({"strengths": [float("nan")]}, ValueError, "must be one or more finite numbers"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0 must be at least 1"),
        ({"num_inference_steps": 1001}, ValueError, "=1001, but the base was trained with 1000 levels of noise"),
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


def test_a_denoiser_with_a_cache_is_refused():
    base = build("flux")
    denoiser: Any = base.denoiser
    denoiser.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        )
    )
    with pytest.raises(ValueError, match=r"has a cache enabled.*Call pipe\.transformer\.disable_cache\(\) first"):
        edit(base, images(base), "thick")
    denoiser.disable_cache()
    edit(base, images(base), "thick")


def test_a_sampler_without_a_step_from_more_than_noise():
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
