"""Adapters in stock pipelines: load, contexts, unload, save; every family, and a video pipeline."""

import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_causal_context import (
    AdapterError,
    CausalContextConfig,
    Context,
    bake,
    intervene,
    load_context_adapter,
    unload_context_adapter,
)
from hf_causal_context.adapter import lookup
from hf_causal_context.bases.loading import as_base
from hf_causal_context.evaluation.readings import Reader
from hf_causal_context.evaluation.sampling import PixelChange, Sampler
from hf_causal_context.inference.merging import merge
from hf_causal_context.inference.sampling import generate, generate_jobs

from .training import tiny_pipelines

CONCEPTS = ("thick", "slant", "size")
CONTEXTS = [("thick",), {"slant": -0.5, "size": 2.0}]
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
BUILDERS = {**tiny_pipelines.PIPELINES, "wan": tiny_pipelines.wan}
ATTENTION_KWARGS = {
    "stable_diffusion": "cross_attention_kwargs",
    "stable_diffusion_xl": "cross_attention_kwargs",
    "stable_diffusion_3": "joint_attention_kwargs",
    "flux": "joint_attention_kwargs",
    "flux2_klein": "attention_kwargs",
    "flux2_dev": "attention_kwargs",
    "z_image": "joint_attention_kwargs",
    "qwen_image": "attention_kwargs",
    "chroma": "joint_attention_kwargs",
    "krea2": "attention_kwargs",
    **dict.fromkeys(("sana", "lumina2", "aura_flow", "cogview4", "hunyuan_image", "hidream_image"), "attention_kwargs"),
    "wan": "attention_kwargs",
}
EVERY = [*tiny_pipelines.EVERY, "wan"]
PER_PROMPT = [name for name in EVERY if name not in ("ddpm", "ddpm_classes", "ddim", "dit")]


def build(name):
    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    if name == "ddpm_classes":  # its pipeline passes no classes
        pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                kwargs | {"class_labels": torch.full((len(args[0]),), 2, device=args[0].device)},
            ),
            with_kwargs=True,
        )
    return pipe


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def write_adapter(model, folder, **kwargs):
    """An adapter with random weights for a model, in a folder; the model stays as it is."""
    torch.manual_seed(1)
    options = {"concepts": CONCEPTS, "target_modules": "all-linear", "init_weights": False, "alpha": 1.0}
    options["exclude_modules"] = tiny_pipelines.JOINED.get(type(model).__name__)
    config = CausalContextConfig(**options | kwargs)
    get_peft_model(copy.deepcopy(model), config).save_pretrained(folder, save_embedding_layers=False)
    return folder


def run(name, pipe, rows=(0, 1), images=1, guidance=3.0, family=as_base, **kwargs):
    """Images for some of two prompts (or classes, or seeds), each with noise of its own."""
    seeds = [10 * row + image for row in rows for image in range(images)]
    arguments = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], "num_inference_steps": 2}
    # Of several images per prompt, some pipelines pair text with another prompt's mask, which has to be as long.
    prompts = [("two cats" if images > 1 else "a cat", "two dogs")[row] for row in rows]
    if name in ("ddpm", "ddpm_classes", "ddim"):
        arguments |= {"batch_size": len(rows)}
    elif name == "dit":
        arguments |= {"class_labels": [3 + row for row in rows], "guidance_scale": guidance}
    else:
        arguments["prompt"] = prompts
        if name == "wan":
            arguments |= {"guidance_scale": guidance, "num_videos_per_prompt": images}
            arguments |= {"num_frames": 5, "height": 16, "width": 16}
        else:
            base = family(pipe)
            arguments = base.stock_call(resolution=tiny_pipelines.side(base)) | arguments
            arguments |= {"num_images_per_prompt": images}
            arguments |= base.guidance_options(guidance, len(rows)) if base.takes_guidance else {}
        if name != "flux" and not name.startswith("flux2"):
            arguments["negative_prompt"] = ["blurred"] * len(rows)
    output = pipe(**arguments, **kwargs, output_type="np")
    return torch.from_numpy(output.frames if name == "wan" else output.images)


@pytest.fixture(scope="module", params=EVERY)
def loaded(request, tmp_path_factory):
    """Name, the pipeline with an adapter, and one that never had any."""
    name = request.param
    plain = build(name)
    folder = write_adapter(denoiser(plain), tmp_path_factory.mktemp(name) / "adapter")
    return name, load_context_adapter(copy.deepcopy(plain), folder), plain, folder


def test_a_uniform_context_is_the_baked_and_merged_one(loaded):
    name, pipe, plain, _ = loaded
    with intervene(pipe, CONTEXTS[1]):
        images = run(name, pipe)
    config, weights = bake(denoiser(pipe), CONTEXTS[1])
    merged = copy.deepcopy(plain)
    lora = get_peft_model(denoiser(merged), config)
    set_peft_model_state_dict(lora, weights)
    component = "unet" if hasattr(merged, "unet") else "transformer"
    setattr(merged, component, lora.merge_and_unload())
    torch.testing.assert_close(images, run(name, merged), **CLOSE)
    assert (images - run(name, plain)).abs().max() > 5e-3


def test_mixed_prompts_are_separate_runs(loaded):
    name, pipe, plain, _ = loaded
    with intervene(pipe, CONTEXTS):
        together = run(name, pipe)
    apart = []
    for row, context in enumerate(CONTEXTS):
        with intervene(pipe, context):
            apart.append(run(name, pipe, rows=(row,)))
    torch.testing.assert_close(together, torch.cat(apart), **CLOSE)
    if name in ATTENTION_KWARGS:
        again = run(name, pipe, **{ATTENTION_KWARGS[name]: {"context": CONTEXTS}})
        assert torch.equal(again, together)
        assert torch.equal(run(name, plain), run(name, pipe, **{ATTENTION_KWARGS[name]: None}))


@pytest.mark.parametrize("name", PER_PROMPT)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_per_prompt_with_and_without_guidance(tmp_path, name, guidance):
    pipe = build(name)
    load_context_adapter(pipe, write_adapter(denoiser(pipe), tmp_path))
    apart = []
    for row, context in enumerate(CONTEXTS):
        with intervene(pipe, context):
            apart.append(run(name, pipe, rows=(row,), images=2, guidance=guidance))
    for contexts in (CONTEXTS, [CONTEXTS[0], CONTEXTS[0], CONTEXTS[1], CONTEXTS[1]]):  # per prompt, and per image
        with intervene(pipe, contexts):
            together = run(name, pipe, images=2, guidance=guidance)
        torch.testing.assert_close(together, torch.cat(apart), **CLOSE)


def test_a_call_does_not_look_through_all_modules(loaded, monkeypatch):
    name, pipe, *_ = loaded
    with intervene(pipe, CONTEXTS[1]):
        monkeypatch.setattr(lookup, "CausalContextLayer", None)  # what modules would be compared with
        run(name, pipe)


def test_unloading_leaves_no_trace(loaded):
    name, pipe, plain, folder = loaded
    pipe = load_context_adapter(copy.deepcopy(plain), folder)
    assert torch.equal(run(name, pipe), run(name, plain))  # no context
    unload_context_adapter(pipe)
    assert type(pipe) is type(plain)
    ours, theirs = denoiser(pipe), denoiser(plain)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert vars(ours).keys() == vars(theirs).keys()
    assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks)
    assert torch.equal(run(name, pipe), run(name, plain))
    with pytest.raises(ValueError, match="No component of .* has a causal context adapter.*load_context_adapter"):
        intervene(pipe, "thick")


def test_it_stays_while_a_context_is_set(loaded):
    name, pipe, plain, folder = loaded
    pipe = load_context_adapter(copy.deepcopy(plain), folder)
    with intervene(pipe, "thick"):
        images = run(name, pipe)
        with pytest.raises(ValueError, match="cannot be unloaded while a .with intervene"):
            unload_context_adapter(pipe)
        assert torch.equal(run(name, pipe), images)
    unload_context_adapter(pipe)


def test_a_saved_pipeline_has_its_base_and_its_adapter(loaded, tmp_path):
    name, pipe, plain, _ = loaded
    with pytest.warns(UserWarning, match="was saved without its causal context adapter 'default'"):
        pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    for name_, module in again.components.items():
        if isinstance(module, torch.nn.Module):
            expected = getattr(plain, name_).state_dict()
            assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    if name == "ddpm_classes":
        return
    again.set_progress_bar_config(disable=True)
    load_context_adapter(again, tmp_path)
    with intervene(pipe, CONTEXTS):
        expected = run(name, pipe)
    with intervene(again, CONTEXTS):
        assert torch.equal(run(name, again), expected)


class TestVariants:
    """Image-to-image and inpainting, made of a loaded pipeline's components."""

    @pytest.fixture
    def pipe(self, tmp_path):
        pipe = build("stable_diffusion")
        return load_context_adapter(pipe, write_adapter(pipe.unet, tmp_path))

    @pytest.mark.parametrize("task", ["img2img", "inpaint"])
    def test_mixed_prompts(self, pipe, task):
        kind = {"img2img": diffusers.AutoPipelineForImage2Image, "inpaint": diffusers.AutoPipelineForInpainting}[task]
        other = kind.from_pipe(pipe)
        stock = type(other)
        other.set_progress_bar_config(disable=True)
        image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        mask = torch.zeros(2, 1, 16, 16)
        mask[..., 8:] = 1

        def run(rows):
            arguments = {"image": image[list(rows)]}
            if task == "inpaint":
                arguments |= {"mask_image": mask[list(rows)], "height": 16, "width": 16}
            generators = [torch.Generator().manual_seed(row) for row in rows]
            prompts = [("a cat", "two dogs")[row] for row in rows]
            output = other(prompts, **arguments, generator=generators, num_inference_steps=4, output_type="np")
            return torch.from_numpy(output.images)

        with intervene(other, CONTEXTS):
            together = run((0, 1))
        apart = []
        for row, context in enumerate(CONTEXTS):
            with intervene(other, context):
                apart.append(run((row,)))
        torch.testing.assert_close(together, torch.cat(apart), **CLOSE)
        assert (together - run((0, 1))).abs().max() > 1e-3
        assert type(other) is stock

    def test_rows_for_guidance_are_no_images_in_a_pipeline_that_is_not_followed_either(self, pipe):
        other = diffusers.AutoPipelineForText2Image.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        sample = partial(run, "stable_diffusion", other)
        four = [*CONTEXTS, "thick+slant", ()]
        with pytest.raises(ValueError, match="4 contexts were given, but the pipeline was called with 2 prompts"):
            sample(cross_attention_kwargs={"context": four})
        with intervene(pipe.unet, four), pytest.raises(ValueError, match="4 contexts were given, but the pipeline was"):
            sample()
        for guidance in (1.0, 3.0):
            with intervene(other, four):
                expected = sample(images=2, guidance=guidance)
            with intervene(pipe.unet, four, guidance_copies=2):
                assert torch.equal(sample(images=2, guidance=guidance), expected)
        given = {"cross_attention_kwargs": {"context": CONTEXTS}}
        with intervene(other, CONTEXTS):
            assert torch.equal(sample(guidance=1.0), run("stable_diffusion", other, guidance=1.0, **given))

    def test_of_two_threads_the_last_stops_following_them(self, pipe):
        other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        stock = type(other)
        first = intervene(other, "slant")
        with ThreadPoolExecutor(1) as thread:
            thread.submit(first.__enter__).result()
            with intervene(other, "thick"):
                thread.submit(first.__exit__, None, None, None).result()
                assert type(other) is not stock
        assert type(other) is stock

    def test_they_are_saved_whole(self, pipe, tmp_path):
        other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        with pytest.warns(UserWarning, match="was saved without its causal context adapter"):
            other.save_pretrained(tmp_path / "saved")
        stored = load_file(tmp_path / "saved/unet/diffusion_pytorch_model.safetensors")
        assert not any("base_layer" in key or "causal" in key for key in stored)


class TestTextEncoders:
    @pytest.fixture
    def folder(self, tmp_path):
        pipe = build("stable_diffusion")
        write_adapter(pipe.unet, tmp_path / "adapter")
        write_adapter(pipe.unet, tmp_path / "denoiser")
        write_adapter(pipe.text_encoder, tmp_path / "adapter" / "text_encoder", target_modules=["q_proj", "v_proj"])
        return tmp_path / "adapter"

    def test_contexts_reach_both(self, folder):
        pipe = load_context_adapter(build("stable_diffusion"), folder)
        with intervene(pipe, CONTEXTS):
            together = run("stable_diffusion", pipe, images=2)
        assert torch.equal(
            run("stable_diffusion", pipe, images=2, cross_attention_kwargs={"context": CONTEXTS}), together
        )
        apart = []
        for row, context in enumerate(CONTEXTS):
            with intervene(pipe, context):
                apart.append(run("stable_diffusion", pipe, rows=(row,), images=2))
        torch.testing.assert_close(together, torch.cat(apart), **CLOSE)
        with intervene(pipe.unet, CONTEXTS, images_per_prompt=2, guidance_copies=2):
            assert (run("stable_diffusion", pipe, images=2) - together).abs().max() > 1e-3
        with (
            intervene(pipe, [CONTEXTS[0]] * 3 + [CONTEXTS[1]]),
            pytest.raises(ValueError, match="4 contexts were given, but the model's input has 2 rows"),
        ):
            run("stable_diffusion", pipe, images=2)

    def test_a_context_that_would_reach_the_denoiser_alone_is_refused(self, folder):
        pipe = load_context_adapter(build("stable_diffusion"), folder)
        other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        given = {"cross_attention_kwargs": {"context": "thick"}}
        with pytest.raises(ValueError, match=r"'default' has a part in 'text_encoder', too.*with intervene\(pipe"):
            run("stable_diffusion", other, **given)
        with intervene(other, "thick"):
            assert torch.equal(run("stable_diffusion", other), run("stable_diffusion", pipe, **given))
        unload_context_adapter(pipe)
        load_context_adapter(pipe, folder.parent / "denoiser")
        run("stable_diffusion", other, **given)

    def test_both_are_saved_and_unloaded(self, folder, tmp_path):
        pipe = load_context_adapter(build("stable_diffusion"), folder)
        with (
            pytest.warns(UserWarning, match="CLIPTextModel was saved without"),
            pytest.warns(UserWarning, match="UNet2DConditionModel was saved without"),
        ):
            pipe.save_pretrained(tmp_path / "saved")
        again = DiffusionPipeline.from_pretrained(tmp_path / "saved", requires_safety_checker=False)
        again.set_progress_bar_config(disable=True)
        load_context_adapter(again, tmp_path / "saved")
        with intervene(pipe, "thick"):
            expected = run("stable_diffusion", pipe)
        with intervene(again, "thick"):
            assert torch.equal(run("stable_diffusion", again), expected)
        for loaded in (pipe, again):
            unload_context_adapter(loaded)
            assert torch.equal(run("stable_diffusion", loaded), run("stable_diffusion", build("stable_diffusion")))

    def test_a_part_for_a_component_that_is_missing_is_said(self, folder):
        pipe = build("stable_diffusion")
        pipe.text_encoder = None
        with pytest.warns(UserWarning, match="adapter of 'text_encoder', and StableDiffusionPipeline has no such comp"):
            load_context_adapter(pipe, folder)

    def test_the_base_of_an_evaluation_has_neither_part(self, folder):
        options = {"prompt": "a cat", "num_inference_steps": 2}
        plain = generate(as_base(build("stable_diffusion")), [()], seeds=[0, 1], **options)[0]
        base = as_base(load_context_adapter(build("stable_diffusion"), folder))
        sampler = Sampler(base, partial(generate_jobs, base, **options), Reader())
        empty, of_base = sampler.empty_and_base([range(2)], PixelChange())
        assert torch.equal(of_base[0].values, plain)
        assert not torch.equal(empty[0].values, plain)  # the observational part

    def test_parts_of_different_adapters(self, folder):
        pipe = build("stable_diffusion")
        write_adapter(pipe.text_encoder, folder / "text_encoder", concepts=("dark",), target_modules=["q_proj"])
        with pytest.raises(ValueError, match="different concepts .*'thick'.*'dark'"):
            load_context_adapter(pipe, folder)
        assert not hasattr(pipe.unet, "peft_config")


class TestTrainedTokens:
    """Rows of a text encoder's embedding, in one of two adapters."""

    IDS = torch.tensor([[1, 3, 4, 5, 2]])

    @pytest.fixture
    def folders(self, tmp_path):
        encoder = build("stable_diffusion").text_encoder
        own = {"target_modules": ["q_proj"], "component": "text_encoder"}
        write_adapter(encoder, tmp_path / "tokens", concepts=("thick",), trainable_token_indices=[3, 4], **own)
        rows = load_file(tmp_path / "tokens" / "adapter_model.safetensors")
        (name,) = (name for name in rows if "token" in name)
        save_file(rows | {name: rows[name] + 1}, tmp_path / "tokens" / "adapter_model.safetensors")
        write_adapter(encoder, tmp_path / "plain", concepts=("dark",), **own)
        return tmp_path / "plain", tmp_path / "tokens"

    def hidden(self, pipe, context=None):
        with torch.no_grad(), intervene(pipe.text_encoder, context) if context else nullcontext():
            return pipe.text_encoder(self.IDS).last_hidden_state

    def test_they_go_with_their_adapter(self, folders):
        pipe = build("stable_diffusion")
        base = self.hidden(pipe)
        for folder in folders:
            load_context_adapter(pipe, folder, folder.name)
            assert torch.equal(self.hidden(pipe), base)
        assert not torch.allclose(self.hidden(pipe, "thick"), base, atol=1e-3)
        unload_context_adapter(pipe, "tokens")
        assert torch.equal(self.hidden(pipe), base)
        unload_context_adapter(pipe)
        assert torch.equal(self.hidden(pipe), base)
        assert type(pipe.text_encoder.get_input_embeddings()) is torch.nn.Embedding

    def test_an_adapter_without_comes_first(self, folders):
        plain, tokens = folders
        pipe = load_context_adapter(build("stable_diffusion"), tokens, "tokens")
        with pytest.raises(ValueError, match="trained tokens is loaded into pipe.text_encoder, and .* has none"):
            load_context_adapter(pipe, plain, "plain")

    def test_they_are_merged(self, folders):
        pipe = load_context_adapter(build("stable_diffusion"), folders[1])
        expected = self.hidden(pipe, "thick")
        merge(as_base(pipe), Context("thick"))
        torch.testing.assert_close(self.hidden(pipe), expected, **CLOSE)
        assert type(pipe.text_encoder.get_input_embeddings()) is torch.nn.Embedding


class TestSeveralAdapters:
    @pytest.fixture
    def pipe(self, tmp_path):
        pipe = build("ddim")
        write_adapter(pipe.unet, tmp_path / "first")
        write_adapter(pipe.unet, tmp_path / "second", concepts=("dark",), target_modules=["to_q"])
        load_context_adapter(pipe, tmp_path / "first", "first")
        return load_context_adapter(pipe, tmp_path / "second", "second")

    def test_concepts_of_both(self, pipe):
        base = run("ddim", pipe)
        with intervene(pipe, "thick"):
            thick = run("ddim", pipe)
        with intervene(pipe, "dark"):
            dark = run("ddim", pipe)
        with intervene(pipe, "thick+dark"):
            both = run("ddim", pipe)
        images = [base, thick, dark, both]
        assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])

    def test_a_context_for_the_other_one(self, pipe):
        with pytest.raises(ValueError, match="Unknown concept 'dark'.*of adapter 'first'.*belongs to adapter 'second'"):
            intervene(pipe, "dark", adapter_name="first")
        with pytest.raises(ValueError, match="Unknown adapter 'third'. This model has: 'first', 'second'"):
            intervene(pipe, "dark", adapter_name="third")

    def test_unload_one(self, pipe):
        with intervene(pipe, "thick"):
            expected = run("ddim", pipe)
        unload_context_adapter(pipe, "second")
        with intervene(pipe, "thick"):
            assert torch.equal(run("ddim", pipe), expected)
        with pytest.raises(ValueError, match="Unknown concept 'dark'"):
            intervene(pipe, "dark")
        with pytest.raises(ValueError, match="has no causal context adapter 'second'. It has: 'first'"):
            unload_context_adapter(pipe, "second")
        unload_context_adapter(pipe, "first")
        assert torch.equal(run("ddim", pipe), run("ddim", build("ddim")))

    def test_both_are_saved(self, pipe, tmp_path):
        with pytest.warns(UserWarning, match="was saved without"):
            pipe.save_pretrained(tmp_path / "saved")
        again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
        again.set_progress_bar_config(disable=True)
        for name in ("first", "second"):
            load_context_adapter(again, tmp_path / "saved", name)
        for loaded in (pipe, again):
            with intervene(loaded, "thick+dark"):
                images = run("ddim", loaded)
        with intervene(pipe, "thick+dark"):
            assert torch.equal(run("ddim", pipe), images)


class TestOneInEachOfTwoComponents:
    @pytest.fixture
    def pipe(self, tmp_path):
        pipe = build("stable_diffusion")
        write_adapter(pipe.unet, tmp_path / "first")
        write_adapter(pipe.text_encoder, tmp_path / "second" / "text_encoder", target_modules=["q_proj"])
        load_context_adapter(pipe, tmp_path / "first", "first")
        return load_context_adapter(pipe, tmp_path / "second", "second")

    def test_the_last_one_of_a_component_stays_while_a_context_is_set_for_it(self, pipe):
        with intervene(pipe, "thick", adapter_name="first"):
            images = run("stable_diffusion", pipe)
            with pytest.raises(ValueError, match="cannot be unloaded while a .with intervene"):
                unload_context_adapter(pipe, "first")
            unload_context_adapter(pipe, "second")
            assert torch.equal(run("stable_diffusion", pipe), images)

    def test_a_style_of_the_same_name_in_another_component_stays(self, pipe):
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["k_proj"]), adapter_name="first")
        unload_context_adapter(pipe, "first")
        assert pipe.text_encoder.peft_config.keys() == {"first", "second"}
        assert not hasattr(pipe.unet, "peft_config")


class TestRefusals:
    @pytest.fixture
    def pipe(self):
        return build("stable_diffusion")

    @pytest.fixture
    def folder(self, pipe, tmp_path):
        return write_adapter(pipe.unet, tmp_path / "adapter")

    def test_contexts(self, pipe, folder):
        load_context_adapter(pipe, folder)
        with pytest.raises(ValueError, match="Unknown concept 'dark'.*Known concepts: 'thick', 'slant', 'size'"):
            run("stable_diffusion", pipe, cross_attention_kwargs={"context": "dark"})
        encode = pipe.text_encoder.forward
        pipe.text_encoder.forward = lambda *args, **kwargs: pytest.fail("work was done")
        with (
            intervene(pipe, ["thick", "slant", "size"]),
            pytest.raises(ValueError, match="3 contexts were given, but the pipeline was called with 2 prompts"),
        ):
            run("stable_diffusion", pipe)
        pipe.text_encoder.forward = encode
        with pytest.raises(TypeError, match="a model .nn.Module. or a diffusers pipeline, not dict"):
            intervene({}, "thick")

    def test_another_class(self, folder):
        with pytest.raises(ValueError, match="needs a UNet2DConditionModel, which DiTPipeline does not have"):
            load_context_adapter(build("dit"), folder)

    def test_two_adapters_of_one_component_in_a_folder(self, pipe, folder):
        write_adapter(pipe.unet, folder / "unet" / "default")  # as a saved pipeline has it
        with pytest.raises(
            AdapterError, match="two adapters of pipe.unet: one at the top, and one in unet/default. Rem"
        ):
            load_context_adapter(pipe, folder)

    def test_another_base_of_the_same_class(self, folder):
        other = build("stable_diffusion_xl")
        with pytest.raises(
            ValueError, match="does not fit this UNet2DConditionModel: .* takes inputs of size 16 there, 32"
        ):
            load_context_adapter(other, folder)
        assert not hasattr(other.unet, "peft_config")

    def test_no_denoiser(self, pipe, folder):
        class Vae(DiffusionPipeline):
            def __init__(self, vae):
                super().__init__()
                self.register_modules(vae=vae)

        with pytest.raises(ValueError, match="needs a UNet2DConditionModel, which Vae does not have .*AutoencoderKL"):
            load_context_adapter(Vae(pipe.vae), folder)
        with pytest.raises(TypeError, match="into a diffusers pipeline, not into a UNet2DConditionModel"):
            load_context_adapter(pipe.unet, folder)

    def test_names(self, pipe, folder):
        load_context_adapter(pipe, folder)
        with pytest.raises(ValueError, match="already has an adapter 'default'. Unload it first, or give another"):
            load_context_adapter(pipe, folder)

    def test_what_is_no_adapter(self, pipe, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no adapter: there is no adapter_config.json"):
            load_context_adapter(pipe, tmp_path)
        with pytest.raises(FileNotFoundError, match="nowhere is no folder here, and no id of a repository"):
            load_context_adapter(pipe, tmp_path / "nowhere")
        get_peft_model(copy.deepcopy(pipe.unet), LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path / "lora")
        with pytest.raises(ValueError, match="is a .*LORA adapter.*pipe.load_lora_weights"):
            load_context_adapter(pipe, tmp_path / "lora")

    def test_a_saved_pipeline_whose_adapters_have_other_names(self, pipe, folder, tmp_path):
        load_context_adapter(pipe, folder, adapter_name="first")
        with pytest.warns(UserWarning, match="saved without its causal context adapter 'first'"):
            pipe.save_pretrained(tmp_path / "pipe")
        plain = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match="'default' is looked for: load each .* is one of 'first'"):
            load_context_adapter(plain, tmp_path / "pipe")
        load_context_adapter(plain, tmp_path / "pipe", adapter_name="first")

    def test_a_training_that_is_not_finished(self, pipe, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "run" / "checkpoint-20")
        with pytest.raises(FileNotFoundError, match="not finished: resume it, or use a checkpoint: .*checkpoint-20"):
            load_context_adapter(pipe, tmp_path / "run")

    def test_damaged_files(self, pipe, folder):
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        key = next(iter(weights))
        save_file({k: w for k, w in weights.items() if k != key}, file)
        with pytest.raises(ValueError, match="is not whole: it lacks 1 weights"):
            load_context_adapter(pipe, folder)
        assert not hasattr(pipe.unet, "peft_config")
        assert torch.equal(run("stable_diffusion", pipe), run("stable_diffusion", build("stable_diffusion")))
        save_file({"something": torch.zeros(1)}, file)
        with pytest.raises(ValueError, match="holds no weights of a causal context adapter"):
            load_context_adapter(pipe, folder)
        file.rename(folder / "adapter_model.bin")
        with pytest.raises(AdapterError, match="a pickle file.* read from safetensors only: .*save it"):
            load_context_adapter(pipe, folder)

    def test_peft_models(self, pipe, folder):
        pipe.unet = PeftModel.from_pretrained(pipe.unet, folder)
        with pytest.raises(ValueError, match="pipe.unet is a PeftModel, which pipelines cannot save"):
            load_context_adapter(pipe, folder)

    def test_merged(self, pipe, folder, tmp_path):
        load_context_adapter(pipe, folder)
        with intervene(pipe, "thick"):
            pipe.unet.fuse_lora()
        with pytest.raises(ValueError, match="are merged into the weights of pipe.unet"):
            unload_context_adapter(pipe)
        with pytest.raises(ValueError, match="cannot be saved as it was. Call unmerge_adapter"):
            pipe.save_pretrained(tmp_path / "saved")

    def test_offloaded_parts(self, pipe, folder):
        pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
        with pytest.raises(ValueError, match="are offloaded one by one .*Load the adapter first"):
            load_context_adapter(pipe, folder)


class TestRuntime:
    @pytest.fixture
    def pipe(self, tmp_path):
        pipe = build("stable_diffusion")
        return load_context_adapter(pipe, write_adapter(pipe.unet, tmp_path))

    @pytest.fixture
    def expected(self, pipe):
        with intervene(pipe, CONTEXTS):
            return run("stable_diffusion", pipe)

    def test_model_offload(self, pipe, expected):
        # Refused for "cpu", where it is of no use, but not as a device.
        pipe.enable_model_cpu_offload(device=torch.device("cpu"))
        with intervene(pipe, CONTEXTS):
            assert torch.equal(run("stable_diffusion", pipe), expected)
        unload_context_adapter(pipe)
        assert torch.equal(run("stable_diffusion", pipe), run("stable_diffusion", build("stable_diffusion")))

    @pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
    def test_group_offload(self, pipe, expected, kind):
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks)
        with intervene(pipe, CONTEXTS):
            assert torch.equal(run("stable_diffusion", pipe), expected)

    def test_compile(self, pipe, expected):
        pipe.unet.compile(fullgraph=True, backend="eager")
        with intervene(pipe, CONTEXTS):
            torch.testing.assert_close(run("stable_diffusion", pipe), expected, **CLOSE)
        images = run("stable_diffusion", pipe, cross_attention_kwargs={"context": CONTEXTS})
        torch.testing.assert_close(images, expected, **CLOSE)

    def test_bfloat16(self, pipe, tmp_path):
        half = build("stable_diffusion").to(torch.bfloat16)
        load_context_adapter(half, write_adapter(build("stable_diffusion").unet, tmp_path / "adapter"))
        assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
        # The same noise for both: from one seed, torch 2.11 draws another in bfloat16 than in float32.
        noise = torch.randn(2, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        with intervene(half, CONTEXTS):
            together = run("stable_diffusion", half, latents=noise.bfloat16())
        with intervene(pipe, CONTEXTS):
            exact = run("stable_diffusion", pipe, latents=noise)
        without = run("stable_diffusion", pipe, latents=noise)
        assert (together - exact).abs().mean() < 0.1 * (without - exact).abs().mean() + 0.02

    def test_pickle_and_copy(self, pipe, expected):
        for again in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
            with intervene(again, CONTEXTS):
                assert torch.equal(run("stable_diffusion", again), expected)
            unload_context_adapter(again)
            assert not hasattr(again.unet, "peft_config")
        with intervene(pipe, CONTEXTS):
            assert torch.equal(run("stable_diffusion", pipe), expected)

    def test_diffusers_own_adapter_calls(self, pipe, expected):
        assert pipe.unet.active_adapters() == ["default"]
        pipe.unet.disable_lora()
        with intervene(pipe, CONTEXTS):
            assert torch.equal(run("stable_diffusion", pipe), run("stable_diffusion", build("stable_diffusion")))
        pipe.unet.enable_lora()
        with intervene(pipe, CONTEXTS):
            assert torch.equal(run("stable_diffusion", pipe), expected)

    def test_contexts_inside_attention_arguments_of_a_bare_denoiser(self, pipe):
        inputs = (torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, 16))
        with torch.no_grad():
            expected = pipe.unet(*inputs, context=CONTEXTS).sample
            given = pipe.unet(*inputs, cross_attention_kwargs={"context": CONTEXTS}).sample
        assert torch.equal(given, expected)
