"""Families of videos: calls like their pipelines', and one step of training written out."""

import inspect
from functools import partial

import diffusers
import pytest
import torch
from peft import get_peft_model

from hf_causal_context import CausalContextConfig
from hf_causal_context.bases.loading import load_base
from hf_causal_context.training.denoiser.gap import solver_of
from hf_causal_context.training.denoiser.objectives import Batch, denoising_objective
from hf_causal_context.training.noise import Draws

from .tiny_videos import SIZE, VIDEOS, frames_of

# Mochi asks for float32 by autocast, which is what a CPU has without.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")

CAPTIONS = ["a cat", "two very large dogs"]
ALL = pytest.mark.parametrize("name", VIDEOS)
SLOWLY = pytest.mark.parametrize(
    "name", [name if name == "wan" else pytest.param(name, marks=pytest.mark.slow) for name in VIDEOS]
)


def adapt(base):
    settings = {"target_modules": ["to_q", "to_out.0"], "observational_rank": 0, "init_weights": False}
    return get_peft_model(base.denoiser, CausalContextConfig(concepts=("thick", "slant"), **settings))


def unpacked(name, data, frames=3):
    """The transformer's tokens, or clips -> (B, C, F, H, W)."""
    if name.startswith("cogvideox"):
        return data.transpose(1, 2)
    return diffusers.LTXPipeline._unpack_latents(data, frames, 2, 2) if name == "ltx" else data


@ALL
def test_predict_calls_the_denoiser_as_the_pipeline_does(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    model, calls, outputs = adapt(base).eval(), [], []

    def record(module, args, kwargs, output):
        bound = inspect.signature(type(base.denoiser).forward).bind(module, *args, **kwargs).arguments
        skipped = ("self", "return_dict")
        calls.append({k: v for k, v in bound.items() if k not in skipped and v is not None and v != {}})
        outputs.append(output[0])

    base.denoiser.register_forward_hook(record, with_kwargs=True)
    base.pipe.set_progress_bar_config(disable=True)
    options = base.stock_call(resolution=SIZE, num_frames=frames_of(name), guidance_scale=1.0) | {"prompt": CAPTIONS}
    base.pipe(**options, num_inference_steps=2, output_type="latent")
    theirs = calls[0]
    noisy = unpacked(name, theirs["hidden_states"])
    timesteps = theirs["timestep"].reshape(2, -1)[:, 0]
    timesteps = 1000 - timesteps if name == "mochi" else timesteps
    with torch.no_grad():
        prediction = base.predict(model, noisy, timesteps, base.encode_captions(CAPTIONS), torch.zeros(2, 2))
    ours = calls[-1]
    for call in (ours, theirs):
        call["timestep"] = call["timestep"].float()
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    sign = -1 if name == "mochi" else 1
    torch.testing.assert_close(prediction, sign * unpacked(name, outputs[0]), rtol=1e-4, atol=1e-5)


# No script of diffusers trains these flows: the loss of its others, with the denoiser called as the pipelines do.


def wan(pipe, clips, noised, transformer):
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    clean = (pipe.vae.encode(clips).latent_dist.mode() - mean) / std
    noise, noisy, times = noised(clean)
    text, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=512)
    if pipe.config.expand_timesteps:
        times = times.repeat_interleave(3 * 2 * 2).view(2, -1)
    return transformer(noisy, times, text, return_dict=False)[0] - (noise - clean)


def ltx_video(pipe, clips, noised, transformer):
    clean = pipe.vae.encode(clips).latent_dist.mode()
    clean = pipe._normalize_latents(clean, pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor)
    clean = pipe._pack_latents(clean)
    noise, noisy, times = noised(clean, pipe._pack_latents)
    text, mask, _, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    ratios = pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio
    predicted = transformer(
        hidden_states=noisy,
        encoder_hidden_states=text,
        timestep=times,
        encoder_attention_mask=mask,
        num_frames=3,
        height=2,
        width=2,
        rope_interpolation_scale=(ratios[0] / 25, ratios[1], ratios[1]),
        return_dict=False,
    )[0]
    return predicted - (noise - clean)


def hunyuan_video(pipe, clips, noised, transformer):
    clean = pipe.vae.encode(clips).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise, noisy, times = noised(clean)
    text, pooled, mask = pipe.encode_prompt(CAPTIONS)
    guidance = torch.tensor([1000.0] * 2)
    return transformer(noisy, times, text, mask.float(), pooled, guidance, return_dict=False)[0] - (noise - clean)


def mochi(pipe, clips, noised, transformer):
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    clean = (pipe.vae.encode(clips).latent_dist.mode() - mean) / std * config.scaling_factor
    noise, noisy, times = noised(clean)
    text, mask, _, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    return transformer(noisy, text, 1000 - times, mask, return_dict=False)[0] - (clean - noise)


@pytest.mark.parametrize(
    ("name", "expert", "script"),
    [
        ("wan", None, wan),
        ("wan_2_2_small", None, wan),
        ("wan_2_2", "transformer", wan),
        ("wan_2_2", "transformer_2", wan),
        ("ltx", None, ltx_video),
        ("hunyuan_video", None, hunyuan_video),
        ("mochi", None, mochi),
    ],
)
def test_a_loss_is_that_of_a_step_written_out(name, expert, script, pipeline_folder):
    base = load_base(pipeline_folder(name))
    if expert:
        base.use_denoiser(expert)
    model, config = adapt(base), base.pipe.scheduler.config
    clips, context = torch.rand(2, 3, frames_of(name), SIZE, SIZE) * 2 - 1, torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    clean = base.encode_images(clips)
    draws = Draws(0, range(2))
    shift = config.get("flow_shift") or (1.0 if config.use_dynamic_shifting else config.shift)
    levels = torch.arange(1000, 0, -1) / 1000
    levels = shift * levels / (1 + (shift - 1) * levels)
    if expert:
        levels = levels[(levels >= 0.875) == (expert == "transformer")]
    levels = levels[(draws.normal().sigmoid() * len(levels)).long()]  # logit-normal
    noise = draws.normal(*clean.shape[1:])

    def noised(latents, packed=lambda tensor: tensor):
        sigma = levels.view(-1, *(1,) * (latents.ndim - 1))
        return packed(noise), (1 - sigma) * latents + sigma * packed(noise), 1000 * levels

    batch = Batch(clean, context, base.encode_captions(CAPTIONS), Draws(0, range(2)))
    with torch.no_grad():
        losses = denoising_objective(base)(model, batch)
        errors = script(base.pipe, clips, noised, partial(model, context=context))
    torch.testing.assert_close(losses, errors.square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox_1_5"])
def test_the_loss_of_cogvideox_is_that_of_diffusers_script(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    pipe, model = base.pipe, adapt(base)
    clips, context = torch.rand(2, 3, 9, SIZE, SIZE) * 2 - 1, torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    clean = (pipe.vae.encode(clips).latent_dist.mode() * pipe.vae.config.scaling_factor).permute(0, 2, 1, 3, 4)
    if name == "cogvideox_1_5":
        clean = torch.cat([clean[:, :1], clean], dim=1)
    draws = Draws(0, range(2))
    times = draws.integers(1000)
    noise = draws.normal(*clean.transpose(1, 2).shape[1:]).transpose(1, 2)
    noisy = scheduler.add_noise(clean, noise, times)
    text = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)[0]
    rotary = pipe._prepare_rotary_positional_embeddings(SIZE, SIZE, clean.shape[1], torch.device("cpu"))
    batch = Batch(base.encode_images(clips), context, base.encode_captions(CAPTIONS), Draws(0, range(2)))
    with torch.no_grad():
        losses = denoising_objective(base)(model, batch)
        output = model(noisy, text, times, image_rotary_emb=rotary, return_dict=False, context=context)[0]
    predicted = scheduler.get_velocity(output, noisy, times)
    weights = 1 / (1 - scheduler.alphas_cumprod[times]).view(2, 1, 1, 1, 1)
    expected = (weights * (predicted - clean) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses, expected.float(), rtol=1e-4, atol=1e-5)


def test_cogvideox_is_sampled_at_the_noise_that_it_was_trained_with(pipeline_folder):
    base = load_base(pipeline_folder("cogvideox"))
    ours, theirs = solver_of(base).alphas_cumprod[:-1], base.pipe.scheduler.alphas_cumprod[:-1]  # the last is 0
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-6)


@SLOWLY
@pytest.mark.parametrize("long", [True, False])
def test_clips_are_decoded_as_the_pipeline_does_and_encoding_is_the_inverse(name, long, pipeline_folder):
    base = load_base(pipeline_folder(name))
    pipe, ended, frames = base.pipe, {}, frames_of(name) if long else 1
    pipe.set_progress_bar_config(disable=True)
    options = base.stock_call(resolution=SIZE, num_frames=frames) | {"prompt": CAPTIONS, "num_inference_steps": 2}
    clips = pipe(output_type="pt", callback_on_step_end=lambda *args: ended.update(args[-1]) or {}, **options).frames
    latents = unpacked(name, ended["latents"], 3 if long else 1)
    torch.testing.assert_close(base.decode_images(latents).transpose(1, 2), clips)
    assert clips.shape == (2, frames, 3, SIZE, SIZE)
    pixels = torch.rand(2, 3, frames, SIZE, SIZE) * 2 - 1
    latents = base.encode_images(pixels)
    assert latents.shape[:2] == (2, base.in_channels)
    shown = pipe.vae(pixels).sample
    torch.testing.assert_close(base.decode_images(latents), (shown / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@ALL
def test_gradient_checkpointing_changes_no_gradient_and_rows_keep_their_context(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    model = adapt(base).train()
    noisy = torch.randn(2, *base.encode_images(torch.zeros(1, 3, frames_of(name), SIZE, SIZE)).shape[1:])
    times, context = torch.tensor([10.0, 700.0]), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    conditions = base.encode_captions(CAPTIONS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients():
        loss = base.predict(model, noisy, times, conditions, context).square().mean()
        return torch.autograd.grad(loss, trained)

    plain = gradients()
    assert any(gradient.abs().max() > 0 for gradient in plain)
    with torch.no_grad():
        together = base.predict(model, noisy, times, conditions, context)
        for i in range(2):
            row = {key: value[[i]] for key, value in conditions.items()}
            alone = base.predict(model, noisy[[i]], times[[i]], row, context[[i]])
            torch.testing.assert_close(together[[i]], alone, rtol=1e-4, atol=1e-4)
    base.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-7)
