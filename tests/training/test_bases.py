"""What the trainer knows about families of bases, against what their own pipelines do."""

import inspect
import re

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from peft import get_peft_model

from hf_causal_context import CausalContextConfig
from hf_causal_context.bases.language import check_language_model
from hf_causal_context.bases.loading import as_base, check_base, load_base

from .packing import NO_GUIDANCE, scheduler_time, unpacked, velocity
from .tiny_pipelines import NEWER, PIPELINES, ddpm, projection, side, stable_diffusion_xl, usually

CONCEPTS = ("thick", "slant")
CAPTIONS = ["a cat", "two very large dogs"]
ALL = pytest.mark.parametrize("name", usually(PIPELINES))
# name: (denoiser, channels of images, channels it is trained on, captions, classes, prediction, resolution)
EXPECTED = {
    "ddpm": ("unet", 1, 1, False, None, "epsilon", 16),
    "ddpm_classes": ("unet", 1, 1, False, 5, "epsilon", 16),
    "ddim": ("unet", 3, 3, False, None, "sample", 16),
    "stable_diffusion": ("unet", 3, 4, True, None, "v_prediction", 16),
    "stable_diffusion_xl": ("unet", 3, 4, True, None, "epsilon", 16),
    "stable_diffusion_3": ("transformer", 3, 4, True, None, "flow", 16),
    "flux": ("transformer", 3, 4, True, None, "flow", 256),
    "flux2_klein": ("transformer", 3, 16, True, None, "flow", 256),
    "z_image": ("transformer", 3, 4, True, None, "flow", 1024),
    "qwen_image": ("transformer", 3, 4, True, None, "flow", 256),
    "chroma": ("transformer", 3, 4, True, None, "flow", 256),
    "flux2_dev": ("transformer", 3, 16, True, None, "flow", 256),
    "krea2": ("transformer", 3, 4, True, None, "flow", 1024),
    "sana": ("transformer", 3, 4, True, None, "flow", 32),
    "lumina2": ("transformer", 3, 4, True, None, "flow", 64),
    "aura_flow": ("transformer", 3, 4, True, None, "flow", 16),
    "cogview4": ("transformer", 3, 4, True, None, "flow", 16),
    "hunyuan_image": ("transformer", 3, 4, True, None, "flow", 128),
    "hidream_image": ("transformer", 3, 4, True, None, "flow", 128),
    "pixart_alpha": ("transformer", 3, 4, True, None, "epsilon", 256),
    "pixart_sigma": ("transformer", 3, 4, True, None, "epsilon", 16),
    "dit": ("transformer", 3, 4, False, 1000, "epsilon", 16),
}


def adapt(base):
    settings = {"target_modules": ["to_q", projection(base)], "observational_rank": 0, "init_weights": False}
    config = CausalContextConfig(concepts=CONCEPTS, **settings)
    return get_peft_model(base.denoiser, config)


def noise_of(base):
    return torch.randn_like(base.encode_images(torch.zeros(2, base.image_channels, side(base), side(base))))


def conditions_of(base, rows=2):
    if base.takes_captions:
        return base.encode_captions(CAPTIONS[:rows])
    return {"class_labels": torch.tensor([3, 1][:rows])} if base.takes_classes else {}


@ALL
def test_what_a_base_says_of_itself(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    said = (base.image_channels, base.in_channels, base.takes_captions, base.num_classes, base.prediction)
    assert (base.denoiser_name, *said, base.default_resolution) == EXPECTED[name]
    assert base.takes_classes == (base.num_classes is not None)
    assert base.denoiser is getattr(base.pipe, base.denoiser_name)
    assert base.num_train_timesteps == 1000
    scheduler = base.noise_scheduler()
    assert type(scheduler).__name__ == (
        "FlowMatchEulerDiscreteScheduler" if base.prediction == "flow" else "DDPMScheduler"
    )
    assert base.prediction == "flow" or scheduler.config.prediction_type == base.prediction


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in NEWER])
def test_the_pipelines_decoder_inverts_encode_images(name, pipeline_folder):
    """Decoding as the pipeline does gives what the VAE alone makes of the images."""
    base = load_base(pipeline_folder(name))
    pixels = torch.rand(2, base.image_channels, 16, 16) * 2 - 1
    latents = base.encode_images(pixels)
    if not base.is_latent:
        assert latents is pixels
        return
    assert latents.shape == (2, base.in_channels, 8, 8)
    vae = base.pipe.vae
    expected = vae.encode(pixels).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    torch.testing.assert_close(latents / vae.config.scaling_factor + shift, expected)


def test_latents_with_means_and_deviations():
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 3.0]
    base = as_base(stable_diffusion_xl(latents_mean=mean, latents_std=std))
    pixels = torch.rand(1, 3, 16, 16)
    mode = base.pipe.vae.encode(pixels).latent_dist.mode()
    latents = base.encode_images(pixels) / base.pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents * torch.tensor(std).view(1, 4, 1, 1) + torch.tensor(mean).view(1, 4, 1, 1), mode)


def test_half_precision_encoders_run_in_single_precision(pipeline_folder):
    base = load_base(pipeline_folder("stable_diffusion"), dtype=torch.float16)
    latents = base.encode_images(torch.rand(1, 3, 16, 16))
    assert latents.dtype == torch.float32
    assert base.pipe.vae.dtype == torch.float16


def test_offloaded_encoders_get_images_where_they_are_computed(pipeline_folder):
    """As by `enable_model_cpu_offload`: an encoder is moved when it is called. "meta" stands for a GPU."""
    base = load_base(pipeline_folder("stable_diffusion"))
    cpu_offload_with_hook(base.pipe.vae, "meta")
    assert base.encode_images(torch.rand(1, 3, 16, 16)).device.type == "meta"
    base.pipe.vae.to_empty(device="cpu")  # as the hook of the next component does
    assert base.decode_images(torch.rand(1, 4, 8, 8)).device.type == "meta"


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 15, 16), (3, 16, 16)])
def test_images_that_do_not_fit(shape, pipeline_folder):
    base = load_base(pipeline_folder("stable_diffusion"))
    with pytest.raises(ValueError, match=r"do not fit the base: it takes \(rows, 3, height, width\) .* multiples of 8"):
        base.encode_images(torch.rand(shape))


@ALL
def test_predict_calls_the_denoiser_as_the_pipeline_does(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    model = adapt(base).eval()
    calls = []

    def record(module, args, kwargs, output):
        bound = inspect.signature(type(base.denoiser).forward).bind(module, *args, **kwargs).arguments
        del bound["self"]
        bound.pop("return_dict", None)
        calls.append({key: value for key, value in bound.items() if value is not None and value != {}})
        outputs.append(output[0])

    outputs = []
    base.denoiser.register_forward_hook(record, with_kwargs=True)
    conditions = conditions_of(base)
    called = base.stock_call(resolution=side(base))
    if base.takes_captions:
        called["prompt"] = CAPTIONS
    else:
        called |= {"class_labels": [3, 1]} if name == "dit" else {"batch_size": 2}
    if name == "ddpm_classes":  # its pipeline has no argument for them
        labels = torch.tensor([3, 1])
        handle = base.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "class_labels": labels}), with_kwargs=True
        )
    base.pipe.set_progress_bar_config(disable=True)
    guidance = base.guidance_options(NO_GUIDANCE.get(name, 1.0), 2) if base.takes_guidance else {}
    base.pipe(**called, **guidance, num_inference_steps=2, output_type="pt")
    if name == "ddpm_classes":
        handle.remove()
    theirs, their_output = calls[0], outputs[0]
    noisy = unpacked(name, next(theirs[key] for key in ("sample", "hidden_states", "x") if key in theirs))
    time = {"z_image": "t", "hidream_image": "timesteps"}.get(name, "timestep")
    timesteps = scheduler_time(name, theirs[time]).expand(2)

    with torch.no_grad():
        prediction = base.predict(model, noisy, timesteps, conditions, torch.zeros(2, 2))
    ours = calls[-1]
    assert len(calls) > 2
    ours[time], theirs[time] = ours[time].float(), theirs[time].float().expand(2)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert prediction.shape == noisy.shape
    torch.testing.assert_close(prediction, velocity(name, their_output)[:, : noisy.shape[1]], rtol=1e-4, atol=1e-5)


@ALL
def test_gradients_reach_the_adapter_and_rows_keep_their_context(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    model = adapt(base)
    noisy = noise_of(base)
    timesteps = torch.tensor([10.0, 700.0]) if base.prediction == "flow" else torch.tensor([10, 700])
    context, conditions = torch.tensor([[1.0, 0.0], [0.0, 0.5]]), conditions_of(base)
    base.predict(model.train(), noisy, timesteps, conditions, context).square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.abs().max() > 0 for p in trained)
    model.eval()
    with torch.no_grad():
        together = base.predict(model, noisy, timesteps, conditions, context)
        for i in range(2):
            row = {key: value[i : i + 1] for key, value in conditions.items()}
            alone = base.predict(model, noisy[i : i + 1], timesteps[i : i + 1], row, context[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        assert (together - base.predict(model, noisy, timesteps, conditions, 0 * context)).abs().max() > 1e-5


@ALL
def test_gradient_checkpointing_changes_no_gradient(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    model = adapt(base).train()
    noisy, context = noise_of(base), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    timesteps = torch.tensor([10.0, 700.0]) if base.prediction == "flow" else torch.tensor([10, 700])
    conditions = conditions_of(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients():
        loss = base.predict(model, noisy, timesteps, conditions, context).square().mean()
        return torch.autograd.grad(loss, trained)

    plain = gradients()
    base.enable_gradient_checkpointing()
    assert base.denoiser.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-7)


@ALL
def test_bases_in_bfloat16(name, pipeline_folder):
    base = load_base(pipeline_folder(name), dtype=torch.bfloat16)
    model = adapt(base).eval()
    pixels = torch.rand(2, base.image_channels, side(base), side(base), dtype=torch.bfloat16)
    noisy, timesteps = base.encode_images(pixels), torch.tensor([10.0, 700.0])
    prediction = base.predict(model, noisy, timesteps, conditions_of(base), torch.ones(2, 2))
    assert noisy.dtype == prediction.dtype == torch.bfloat16
    assert prediction.shape == noisy.shape


@ALL
def test_captions_become_rows(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    if not base.takes_captions:
        with pytest.raises(ValueError, match="takes no captions"):
            base.encode_captions(CAPTIONS)
        return
    together = base.encode_captions(CAPTIONS)
    apart = [{key: value[0] for key, value in base.encode_captions([caption]).items()} for caption in CAPTIONS]
    joined = base.join_conditions(apart)
    for key, value in together.items():
        assert value.shape[0] == 2
        assert not value.requires_grad
        torch.testing.assert_close(value, joined[key], rtol=1e-5, atol=1e-5)


def test_a_bare_denoiser_is_no_base(tmp_path):
    ddpm().unet.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="is not a saved diffusers pipeline.*save a pipeline around it"):
        load_base(str(tmp_path))
    with pytest.raises(OSError, match="is not a saved diffusers pipeline"):
        load_base("nobody/nothing")


@pytest.mark.parametrize("check", [check_base, lambda name: check_language_model(name, None)])
@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "~/nowhere", "no/where/at/all"])
def test_a_folder_that_does_not_exist_is_told_without_a_word_of_the_network(check, name):
    with pytest.raises(FileNotFoundError, match=f"There is no base '{re.escape(name)}': such a folder does"):
        check(name)


@pytest.mark.parametrize("check", [check_base, lambda name: check_language_model(name, None)])
@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing"])
def test_a_name_that_may_be_of_the_hub_is_told_on_one_line(check, name):
    with pytest.raises(OSError, match="There is no such folder here, and the Hub could not be asked or") as found:
        check(name)
    assert "\n" not in str(found.value)


def test_unsupported_pipelines_and_schedulers(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "AllegroPipeline"}')
    with pytest.raises(
        ValueError, match="'AllegroPipeline' are not supported as a base. Did you mean 'AuraFlow.*DDPM.*sample"
    ):
        load_base(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "Own"]}')
    with pytest.raises(ValueError, match=r"\['pipeline', 'Own'\] are not supported"):
        load_base(str(tmp_path))
    pipe = ddpm()
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler with prediction_type='epsilon' has no noise schedule"):
        as_base(pipe)


def test_pickled_weights_are_refused(tmp_path):
    ddpm().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("size", [(16, 32), None])
def test_a_base_without_a_square_default_resolution(size):
    pipe = ddpm()
    pipe.unet.register_to_config(sample_size=size)
    with pytest.raises(ValueError, match="Pass a resolution, or set sample_size"):
        _ = as_base(pipe).default_resolution
