"""Families of flow transformers, against the loss of diffusers' training scripts, written out, and their pipelines."""

from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import get_peft_model

from hf_causal_context import CausalContextConfig
from hf_causal_context.bases.loading import as_base, load_base
from hf_causal_context.cli import main
from hf_causal_context.inference.sampling import generate
from hf_causal_context.training.denoiser.objectives import Batch, denoising_objective
from hf_causal_context.training.noise import Draws

from . import flow_scripts
from .packing import STATIC, unpacked
from .small import settings, write_folders
from .test_bases import CAPTIONS, adapt
from .tiny_flows import hidream_image, hunyuan_image
from .tiny_pipelines import NEWER, SLOWLY, side

FRAMES = ("qwen_image", "krea2")  # whose autoencoders take them


# What diffusers' training scripts compute: pixels (B, C, H, W) -> the error of the prediction. `noised` gives the noise
# for latents, what it makes of them, and the times in the scheduler's units.


def flux2(pipe, pixels, noised, transformer):
    latents = pipe._patchify_latents(pipe.vae.encode(pixels).latent_dist.mode())
    mean, variance = (values.view(1, -1, 1, 1) for values in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
    clean = (latents - mean) / torch.sqrt(variance + pipe.vae.config.batch_norm_eps)
    noise, noisy, times = noised(clean)
    text, text_ids = pipe.encode_prompt(CAPTIONS)
    ids = pipe._prepare_latent_ids(clean)
    tokens = transformer(
        hidden_states=pipe._pack_latents(noisy),
        timestep=times / 1000,
        guidance=torch.ones(2) if pipe.transformer.config.guidance_embeds else None,
        encoder_hidden_states=text,
        txt_ids=text_ids,
        img_ids=ids,
        return_dict=False,
    )[0]
    return pipe._unpack_latents_with_ids(tokens, ids) - (noise - clean)


def z_image(pipe, pixels, noised, transformer):
    config = pipe.vae.config
    clean = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    noise, noisy, times = noised(clean)
    text, _ = pipe.encode_prompt([*CAPTIONS], do_classifier_free_guidance=False)
    velocities = transformer(list(noisy.unsqueeze(2).unbind(0)), (1000 - times) / 1000, text, return_dict=False)[0]
    return -torch.stack(velocities).squeeze(2) - (noise - clean)


def in_one_frame(vae, pixels):
    """Latents of Qwen-Image's autoencoder, which is one of videos."""
    means, deviations = vae.config.latents_mean, vae.config.latents_std
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (means, deviations))
    return (vae.encode(pixels.unsqueeze(2)).latent_dist.mode() - mean) / std


def qwen_image(pipe, pixels, noised, transformer):
    clean = in_one_frame(pipe.vae, pixels)
    noise, noisy, times = noised(clean)
    text, mask = pipe.encode_prompt(CAPTIONS)
    tokens = transformer(
        hidden_states=pipe._pack_latents(noisy.permute(0, 2, 1, 3, 4), *noisy.squeeze(2).shape),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=times / 1000,
        img_shapes=[(1, 4, 4)] * 2,
        return_dict=False,
    )[0]
    return pipe._unpack_latents(tokens, 16, 16, pipe.vae_scale_factor) - (noise - clean)


def chroma(pipe, pixels, noised, transformer):
    """No script of diffusers: Flux's without guidance, called as the pipeline does."""
    config = pipe.vae.config
    clean = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    noise, noisy, times = noised(clean)
    text, text_ids, mask, *_ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    tokens = transformer(
        hidden_states=pipe._pack_latents(noisy, *noisy.shape),
        timestep=times / 1000,
        encoder_hidden_states=text,
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
        attention_mask=pipe._prepare_attention_mask(2, 16, torch.float32, mask),
        return_dict=False,
    )[0]
    return pipe._unpack_latents(tokens, 16, 16, pipe.vae_scale_factor) - (noise - clean)


def krea2(pipe, pixels, noised, transformer):
    clean = in_one_frame(pipe.vae, pixels)
    noise, noisy, times = noised(clean)
    text, mask = pipe.encode_prompt(CAPTIONS)
    tokens = transformer(
        hidden_states=pipe._pack_latents(noisy.permute(0, 2, 1, 3, 4), *noisy.squeeze(2).shape),
        encoder_hidden_states=text,
        timestep=times / 1000,
        position_ids=pipe.prepare_position_ids(text.shape[1], 4, 4, "cpu"),
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    return pipe._unpack_latents(tokens, 16, 16) - (noise - clean)


SCRIPTS = {
    "flux2_klein": flux2,
    "flux2_dev": flux2,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "chroma": chroma,
    "krea2": krea2,
    **flow_scripts.SCRIPTS,
}


@pytest.mark.parametrize("name", NEWER)
def test_a_loss_is_that_of_diffusers_script(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    model, scheduler = adapt(base), base.noise_scheduler()
    pixels, context = torch.rand(2, 3, side(base), side(base)) * 2 - 1, torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    clean = base.encode_images(pixels)
    draws = Draws(0, range(2))
    index = (draws.normal().sigmoid() * 1000).long()  # logit-normal
    noise = draws.normal(*clean.shape[1:])

    def noised(latents):
        own = noise.view_as(latents)  # a frame more or less
        sigma = scheduler.sigmas[index].view(-1, *(1,) * (latents.ndim - 1))
        return own, (1 - sigma) * latents + sigma * own, scheduler.timesteps[index]

    batch = Batch(clean, context, base.encode_captions(CAPTIONS), Draws(0, range(2)))
    with torch.no_grad():
        losses = denoising_objective(base)(model, batch)
        errors = SCRIPTS[name](base.pipe, pixels, noised, partial(model, context=context))
    torch.testing.assert_close(losses, errors.square().flatten(1).mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NEWER)
def test_images_are_decoded_as_the_pipeline_does_and_encoding_is_the_inverse(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    pipe, ended = base.pipe, {}
    pipe.set_progress_bar_config(disable=True)
    options = base.stock_call(resolution=side(base)) | {"prompt": CAPTIONS, "num_inference_steps": 1}
    images = pipe(output_type="pt", callback_on_step_end=lambda *args: ended.update(args[-1]) or {}, **options).images
    latents = unpacked(name, ended["latents"])
    torch.testing.assert_close(base.decode_images(latents), images)

    pixels = torch.rand(2, 3, side(base), side(base)) * 2 - 1
    latents = base.encode_images(pixels)
    assert latents.shape[:2] == (2, base.in_channels)
    frames = pixels[:, :, None] if name in FRAMES else pixels
    shown = pipe.vae(frames).sample
    shown = shown[:, :, 0] if name in FRAMES else shown
    torch.testing.assert_close(base.decode_images(latents), (shown / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(("name", "distilled"), [*((name, False) for name in NEWER), ("krea2", True)])
def test_the_schedule_is_the_pipelines(name, distilled, pipeline_folder):
    base = load_base(pipeline_folder(name))
    pipe, config = base.pipe, base.pipe.scheduler.config
    if distilled:
        pipe.register_to_config(is_distilled=True)
    is_euler = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    shift = {"use_dynamic_shifting": is_euler and name not in STATIC, "base_shift": 0.7, "max_shift": 1.5}
    pipe.scheduler = type(pipe.scheduler).from_config({**config, **shift})
    pipe.set_progress_bar_config(disable=True)
    size = 3 * side(base)
    pipe(**base.stock_call(prompt="a", resolution=size), num_inference_steps=3, output_type="latent")
    ours = base.euler_scheduler()
    ours.set_timesteps(3, **base.flow_schedule(3, base.encode_images(torch.zeros(1, 3, size, size))))
    torch.testing.assert_close(ours.sigmas, pipe.scheduler.sigmas)


@torch.no_grad()
def test_qwen_image_is_guided_by_an_empty_negative_prompt(pipeline_folder):
    base = load_base(pipeline_folder("qwen_image"))
    options = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16, "true_cfg_scale": 3.0}
    noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
    theirs = base.pipe(prompt=["a cat"] * 2, negative_prompt=[" "] * 2, generator=noise, **options).images
    options = {"num_inference_steps": 2, "resolution": 16}
    (ours,) = generate(base, [()], seeds=range(2), prompt="a cat", guidance_scale=3.0, **options)
    torch.testing.assert_close(ours, theirs)
    (bare,) = generate(base, [()], seeds=range(2), prompt="a cat", **options)
    assert (ours - bare).abs().max() > 1e-3
    call = base.stock_call(prompt="a cat", guidance_scale=3.0)
    assert call == {"prompt": "a cat", "true_cfg_scale": 3.0, "negative_prompt": [" "]}


def test_a_flow_of_another_scheduler_keeps_its_time_steps(pipeline_folder):
    base = load_base(pipeline_folder("sana"))
    theirs, ours = base.pipe.scheduler, base.noise_scheduler()
    assert (ours.sigmas - torch.arange(1000, 0, -1) / 1000).abs().max() < 1e-6  # training does not shift them
    theirs.set_timesteps(6)
    ours.set_timesteps(6, **base.flow_schedule(6, torch.zeros(1, 4, 8, 8)))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=0, atol=1)  # theirs are whole numbers


@torch.no_grad()
def test_cogview4_sees_captions_of_a_mixed_batch_as_it_sees_them_alone(pipeline_folder):
    base = load_base(pipeline_folder("cogview4"))
    model, context = adapt(base).eval(), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([200.0, 700.0])
    captions = ["two cat", "very " * 40]
    apart = [
        base.predict(model, noisy[i : i + 1], times[i : i + 1], base.encode_captions([text]), context[i : i + 1])
        for i, text in enumerate(captions)
    ]
    conditions = base.encode_captions(captions)
    assert conditions["text_attn_mask"].sum(1).tolist() == [16, 48]
    together = base.predict(model, noisy, times, conditions, context)
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)
    alone = base.encode_captions(captions[:1])["encoder_hidden_states"]
    torch.testing.assert_close(alone, base.pipe.encode_prompt(captions[0])[0])


@torch.no_grad()
def test_a_distilled_hunyuan_image_predicts_velocities_without_amplified_guidance():
    base, calls = as_base(hunyuan_image(guidance_embeds=True, use_meanflow=True, text_embed_2_dim=8)), []
    base.pipe.set_progress_bar_config(disable=True)
    base.denoiser.register_forward_hook(lambda module, args, kwargs, output: calls.append(kwargs), with_kwargs=True)
    options = {"num_inference_steps": 1, "distilled_guidance_scale": 1.0, "output_type": "latent"}
    base.pipe("a", height=16, width=16, **options)
    conditions = base.encode_captions(["a", 'a "cat"'])
    ours = base._arguments(calls[0]["hidden_states"].repeat(2, 1, 1, 1), torch.tensor([1000.0, 3.0]), conditions)
    assert calls[0]["guidance"].tolist() == [1000]
    assert ours["guidance"].tolist() == [1000, 1000]
    assert ours["timestep_r"].tolist() == ours["timestep"].tolist() == [1000, 3]
    assert ours["encoder_attention_mask_2"].any(1).tolist() == [False, True]  # letters to be drawn

    model, noisy, context = adapt(base).eval(), torch.randn(2, 4, 8, 8), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    arguments = (noisy, torch.tensor([200.0, 700.0]), conditions, context)
    together = base.predict(model, *arguments)
    for row in range(2):
        alone = [
            {k: v[[row]] for k, v in part.items()} if isinstance(part, dict) else part[[row]] for part in arguments
        ]
        torch.testing.assert_close(together[[row]], base.predict(model, *alone), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", SLOWLY)
def test_the_command_line_trains_and_generates(name, pipeline_folder, tmp_path):
    data, base = write_folders(tmp_path / "data", captions=True), load_base(pipeline_folder(name))
    resolution = side(base)
    given = settings(pipeline_folder(name), data, tmp_path / "adapter", resolution=resolution, max_train_steps=1)
    assert main(["train", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]) == 0
    command = ["generate", "--adapter", given["output_dir"], "--output_dir", str(tmp_path / "images"), "--prompt", "a"]
    command += ["--resolution", str(resolution), "--num_inference_steps", "2", "--seeds", "0"]
    guidance = ["--guidance_scale", "2"] if base.takes_guidance else []
    assert main([*command, *guidance, "--context", "slant+thick"]) == 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["slant+thick-seed0.png"]


def test_all_attention_is_adapted_by_default_also_beside_an_mlp(pipeline_folder):
    model = get_peft_model(load_base(pipeline_folder("flux2_klein")).denoiser, CausalContextConfig(concepts=("a",)))
    double = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    single = ["to_qkv_mlp_proj", "to_out"]
    assert set(model.targeted_module_names) == {
        *(f"transformer_blocks.0.attn.{name}" for name in double),
        *(f"single_transformer_blocks.0.attn.{name}" for name in single),
    }


def test_hidream_is_trained_through_its_experts_at_the_scripts_shift():
    base = as_base(hidream_image())
    assert base.noise_scheduler().config.shift == 3
    denoiser = base.denoiser.double().train()
    arguments = base._arguments(torch.randn(1, 4, 128, 128), torch.tensor([500.0]), base.encode_captions(["a"]))
    arguments = {name: tensor.double() for name, tensor in arguments.items()}
    noisy, direction = arguments.pop("hidden_states").requires_grad_(), torch.randn(1, 4, 128, 128).double()

    def loss(data):
        return denoiser(data, **arguments, return_dict=False)[0].square().sum()

    (gradient,) = torch.autograd.grad(loss(noisy), noisy)
    with torch.no_grad():
        slope = (loss(noisy + 1e-5 * direction) - loss(noisy - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-3, atol=0)


def test_all_attention_of_hidream_is_adapted_by_default():
    model = get_peft_model(as_base(hidream_image()).denoiser, CausalContextConfig(concepts=("a",)))
    names = ["to_q", "to_k", "to_v", "to_out"]
    assert set(model.targeted_module_names) == {
        *(f"double_stream_blocks.0.block.attn1.{name}" for name in [*names, *(f"{name}_t" for name in names)]),
        *(f"single_stream_blocks.0.block.attn1.{name}" for name in names),
    }
