"""Contexts inside stock diffusers pipelines and encoder-decoder generation."""

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    HiDreamImagePipeline,
    Kandinsky5T2VPipeline,
    KandinskyV22Img2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.models import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
from peft import get_peft_model

from hf_causal_context import CausalContextConfig, intervene
from hf_causal_context.adapter import followed_pipeline
from hf_causal_context.adapter.lookup import adapted_layers

from ..architectures import ARCHITECTURES
from ..training.tiny_pipelines import PIPELINES
from .small import CONCEPTS, adapted

CONTEXTS = [("thick",), {"slant": -0.5, "size": 2.0}]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def adapt(model):
    config = CausalContextConfig(concepts=CONCEPTS, target_modules="all-linear", init_weights=False, alpha=0.5)
    get_peft_model(model.eval(), config)  # in place: the pipeline keeps its own class of model
    return model


@pytest.fixture
def vae():
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def test_stable_diffusion_with_guidance_and_images_per_prompt(vae):
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae, None, None, adapt(unet), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    prompts, negative, latents = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(4, 4, 8, 8)

    def sample(rows, images, guidance):
        return pipe(
            prompt_embeds=prompts[rows],
            negative_prompt_embeds=negative[rows],
            latents=latents.view(2, 2, 4, 8, 8)[rows].flatten(0, 1)[:: 2 // images],
            num_images_per_prompt=images,
            num_inference_steps=2,
            guidance_scale=guidance,
            output_type="latent",
        ).images

    both, first, second = slice(0, 2), slice(0, 1), slice(1, 2)
    for images, guidance in ((1, 5.0), (2, 5.0), (2, 1.0)):
        with intervene(unet, CONTEXTS, guidance_copies=2, images_per_prompt=images):
            together = sample(both, images, guidance)
        apart = []
        for rows, context in ((first, CONTEXTS[0]), (second, CONTEXTS[1])):
            with intervene(unet, context):
                apart.append(sample(rows, images, guidance))
        torch.testing.assert_close(together, torch.cat(apart), **CLOSE)
        assert (together - sample(both, images, guidance)).abs().max() > 1e-2
    with (
        intervene(unet, CONTEXTS),
        pytest.raises(ValueError, match="2 contexts were given, but the model's input has 4"),
    ):
        sample(both, 1, 5.0)


@pytest.mark.parametrize(
    ("pipeline", "embeddings"),
    [
        (HiDreamImagePipeline, {"prompt_embeds_t5": 2, "prompt_embeds_llama3": 4}),
        (Kandinsky5T2VPipeline, {"prompt_embeds_qwen": 2}),
        (KandinskyV22Img2ImgPipeline, {"image_embeds": 2, "image": 1}),
    ],
)
def test_embeddings_count_as_prompts_under_any_of_their_names(pipeline, embeddings):
    arguments = {name: torch.zeros(rows, 3, 8) for name, rows in embeddings.items()}
    bound = inspect.signature(pipeline.__call__).bind_partial(None, **arguments)
    assert followed_pipeline._call(bound).prompts == 2


def test_dit_with_guidance(vae):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        out_channels=8,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = DiTPipeline(adapt(transformer), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def sample(labels):
        generators = [torch.Generator().manual_seed(label) for label in labels]
        return torch.from_numpy(
            pipe(labels, generator=generators, num_inference_steps=2, guidance_scale=3.0, output_type="np").images
        )

    with intervene(transformer, CONTEXTS, guidance_copies=2):
        together = sample([3, 4])
    apart = []
    for label, context in zip((3, 4), CONTEXTS, strict=True):
        with intervene(transformer, context):
            apart.append(sample([label]))
    torch.testing.assert_close(together, torch.cat(apart), **CLOSE)
    assert (together - sample([3, 4])).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_pieces_of_what_a_pipeline_decodes_need_one_context(rows):
    pipe = PIPELINES["stable_diffusion"]()
    pipe.set_progress_bar_config(disable=True)
    adapt(pipe.unet)
    adapt(pipe.vae)
    latents, decoded = torch.randn(8, 4, 8, 8), []

    def decode_frames(pipe, step, time, inputs):
        decoded.append(pipe.vae.decode(latents[:rows]).sample)  # as pipelines of videos do
        return inputs

    options = {"num_inference_steps": 1, "callback_on_step_end": decode_frames, "output_type": "latent"}
    with torch.no_grad(), intervene(pipe, CONTEXTS), pytest.raises(ValueError, match=f"called with {rows} rows by a p"):
        pipe(["a", "b"], **options)
    with torch.no_grad(), intervene(pipe, CONTEXTS[0]):
        pipe(["a", "b"], **options)
        torch.testing.assert_close(decoded[0], pipe.vae.decode(latents[:rows]).sample)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_that_generate_calls_by_itself(beams):
    model = adapted(ARCHITECTURES["t5"].build(), target_modules="all-linear")
    ids = torch.arange(1, 7).view(2, 3)

    def generate(ids):
        return model.generate(
            input_ids=ids, num_beams=beams, max_new_tokens=4, do_sample=False, decoder_start_token_id=0
        )

    with intervene(model, CONTEXTS):
        together = generate(ids)
    apart = []
    for i, context in enumerate(CONTEXTS):
        with intervene(model, context):
            apart.append(generate(ids[i : i + 1]))
    assert torch.equal(together, torch.cat(apart))


def test_halves_of_an_autoencoder():
    architecture = ARCHITECTURES["autoencoder_kl"]
    model = adapted(architecture.build(), target_modules=["conv1", "to_q", "to_out.0"], alpha=0.2)
    vae, x = model.get_base_model(), architecture.inputs(2)["sample"]

    @torch.no_grad()
    def through(x):
        return vae.decode(vae.encode(x).latent_dist.mean).sample

    with intervene(model, CONTEXTS):
        together = through(x)
    apart = []
    for i, context in enumerate(CONTEXTS):
        with intervene(model, context):
            apart.append(through(x[i : i + 1]))
    torch.testing.assert_close(together, torch.cat(apart), **CLOSE)


def test_diffusers_adapter_calls():
    architecture = ARCHITECTURES["unet2d_condition"]
    unet, inputs = architecture.build(), architecture.inputs(2)
    with torch.no_grad():
        base = unet(**inputs).sample
        config = CausalContextConfig(concepts=CONCEPTS, target_modules=["to_q", "to_v"], init_weights=False)
        unet.add_adapter(config, adapter_name="first")
        unet.eval()
        adapted_output = unet(**inputs, context="thick").sample
        assert not torch.equal(adapted_output, base)
        unet.disable_lora()
        assert torch.equal(unet(**inputs, context="thick").sample, base)
        unet.enable_lora()
        unet.add_adapter(CausalContextConfig(concepts=("dark",), target_modules=["to_k"]), adapter_name="second")
        unet.set_adapters(["first"])
        assert torch.equal(unet(**inputs, context="thick").sample, adapted_output)
        unet.set_adapters(["first", "second"])
        torch.testing.assert_close(unet(**inputs, context="thick+dark").sample, adapted_output)
        with intervene(unet, "thick"):
            unet.fuse_lora(adapter_names=["first"])
        torch.testing.assert_close(unet(**inputs).sample, adapted_output, rtol=1e-4, atol=1e-5)
        unet.unfuse_lora()
        unet.delete_adapters("second")
        torch.testing.assert_close(unet(**inputs, context="thick").sample, adapted_output, rtol=1e-4, atol=1e-5)


def test_an_adapter_can_come_back_after_unload_lora():
    architecture = ARCHITECTURES["unet2d_condition"]
    unet, inputs = architecture.build(), architecture.inputs(2)
    config = CausalContextConfig(concepts=CONCEPTS, target_modules=["to_q"], init_weights=False)
    with torch.no_grad():
        base = unet(**inputs).sample
        for _ in range(2):
            unet.add_adapter(config, adapter_name="first")
            assert not torch.equal(unet(**inputs, context="thick").sample, base)
            unet.unload_lora()
            assert torch.equal(unet(**inputs).sample, base)
            with pytest.raises(TypeError, match="context"):
                unet(**inputs, context="thick")


@pytest.mark.parametrize("mechanism", ["independent", "reduced", "structural"])
def test_a_scale_in_attention_arguments_acts_in_every_mechanism(mechanism):
    torch.manual_seed(0)
    pipe = PIPELINES["stable_diffusion"]()
    pipe.set_progress_bar_config(disable=True)
    config = CausalContextConfig(
        concepts=CONCEPTS, mechanism=mechanism, target_modules=["to_q", "to_v"], init_weights=False, alpha=2.0
    )
    get_peft_model(pipe.unet.eval(), config)
    layers = adapted_layers(pipe.unet).values()
    inputs = torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, 16)

    def outputs(scale):
        arguments = {"cross_attention_kwargs": {"scale": scale}}
        with torch.no_grad(), intervene(pipe, "thick"):
            generator = torch.Generator().manual_seed(0)
            images = pipe(["a"], num_inference_steps=2, generator=generator, output_type="pt", **arguments).images
            return torch.cat([pipe.unet(*inputs, **arguments).sample.flatten(), images.flatten()])

    given, full = outputs(0.25), outputs(1.0)
    for layer in layers:
        layer.set_scale("default", 0.25)
    torch.testing.assert_close(given, outputs(1.0), rtol=1e-5, atol=1e-5)
    assert (given - full).abs().max() > 1e-2
