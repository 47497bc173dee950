"""The nodes in ComfyUI itself: what they do there is what the adapter does in diffusers."""

import asyncio
import importlib

import diffusers
import pytest
import torch
from peft import get_peft_model
from torch import nn

from examples.comfyui.targets import find_key, known_targets
from hf_causal_context import CausalContextConfig, Context, intervene, load_context_adapter
from hf_causal_context.adapter.baking import context_strengths
from hf_causal_context.adapter.lookup import adapted_layers
from hf_causal_context.bases.loading import as_base
from hf_causal_context.inference.export import export_contexts

from ..training.tiny_parts import _clip
from ..training.tiny_pipelines import PIPELINES, stable_diffusion
from .comfy_families import ATTENTION, FAMILIES, build, load_comfyui

CONCEPTS = ("thick", "slant", "v1.5")
CONTEXTS = [Context({"thick": 0.5, "slant": 1.0}), Context({"v1.5": -1.0, "observational": 0.5}), Context()]
CPU = torch.device("cpu")
PIPELINE_OF = {"sd15": "stable_diffusion", "sdxl": "stable_diffusion_xl", "sd3": "stable_diffusion_3"}
pytestmark = pytest.mark.filterwarnings("ignore")  # ComfyUI's own


@pytest.fixture
def nodes():
    load_comfyui()
    return importlib.import_module("examples.comfyui.nodes")


def adapt(network, targets, folder, **settings):
    settings = {"concepts": CONCEPTS, "concept_rank": 2, "observational_rank": 3, "mechanism": "reduced", **settings}
    config = CausalContextConfig(init_weights=False, target_modules=targets, alpha=3.0, **settings)
    adapted = get_peft_model(network, config).eval()
    adapted.save_pretrained(folder)
    return adapted


def patcher(model):
    return load_comfyui().comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def repeated(inputs, rows):
    """Other images for every row, and what else there is."""
    torch.manual_seed(1)
    return {
        name: torch.randn(rows, *value.shape[1:]) if name in ("x", "c") else value.expand(rows, *value.shape[1:])
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_weights_and_outputs_in_a_context_are_those_of_diffusers(nodes, tmp_path, family):
    pair = build(family)
    inputs = repeated(pair.inputs, 2)
    plain = pair.call(**inputs)
    torch.testing.assert_close(pair.comfy_call(**inputs), plain, rtol=1e-4, atol=1e-4)  # the pair is one
    adapted = adapt(pair.theirs, pair.targets, tmp_path)
    before = {name: weight.clone() for name, weight in pair.model.state_dict().items()}

    model, clip = nodes.apply_contexts(patcher(pair.model), None, tmp_path, CONTEXTS[:1])

    assert clip is None
    assert sum(len(patches) for patches in model.patches.values()) == len(adapted_layers(pair.theirs))
    places = nodes.comfy.lora.model_lora_keys_unet(pair.model, {})
    targets = known_targets(places, before)
    strengths = context_strengths(adapted.peft_config["default"], CONTEXTS[:1])
    patched = {name: model.patch_weight_to_device(name, return_weight=True) for name in model.patches}
    for path, layer in adapted_layers(pair.theirs).items():
        target = targets[find_key("", path, targets)]
        change = layer.get_delta_weight("default", strengths)
        change = change if target.function is None else target.function(change)
        was, now = (
            each[target.weight] if target.offset is None else each[target.weight].narrow(*target.offset)
            for each in (before, patched)
        )
        assert torch.equal(now, was + change.view_as(was))
    model.patch_model(CPU)
    with intervene(pair.theirs, CONTEXTS[0]):
        expected = pair.call(**inputs)
    torch.testing.assert_close(pair.comfy_call(**inputs), expected, rtol=1e-4, atol=2e-4)
    assert (expected - plain).abs().max() > 0.05
    model.unpatch_model(CPU)
    assert all(torch.equal(weight, before[name]) for name, weight in pair.model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_images_of_a_batch_have_contexts_of_their_own(nodes, tmp_path, family):
    pair = build(family)
    adapt(pair.theirs, pair.targets, tmp_path)
    model, _ = nodes.apply_contexts(patcher(pair.model), None, tmp_path, CONTEXTS)
    assert not model.patches
    ((wrap,),) = model.wrappers["apply_model"].values()
    inputs = repeated(pair.inputs, 2 * len(CONTEXTS))  # with prompt and without it
    with intervene(pair.theirs, CONTEXTS * 2):
        expected = pair.call(**inputs)

    class Executor:
        class_obj = pair.model

        def __call__(self, x, t, *_):
            return pair.comfy_call(**inputs)

    options = {"cond_or_uncond": [0, 1]}
    found = wrap(Executor(), inputs["x"], inputs["t"], None, None, None, options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    effect = (found - pair.comfy_call(**inputs)).flatten(1).abs().amax(1)
    assert effect.view(2, -1)[:, :2].min() > 0.05


@pytest.mark.parametrize("contexts", [CONTEXTS[:1], CONTEXTS[:2]])
def test_sampled_latents_are_those_of_the_pipeline(nodes, tmp_path, contexts):
    comfy = load_comfyui().comfy
    pair = build("sd15")
    adapt(pair.theirs, ATTENTION, tmp_path)
    pipe = stable_diffusion()
    pipe.register_modules(
        unet=build("sd15").theirs,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    load_context_adapter(pipe, tmp_path)
    noise, prompt, no_prompt = torch.randn(2, 4, 8, 8), torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    pipe.scheduler.set_timesteps(4)
    sigmas = pipe.scheduler.sigmas.clone()
    with intervene(pipe, contexts[0] if len(contexts) == 1 else contexts):
        expected = pipe(
            prompt_embeds=prompt.expand(2, -1, -1),
            negative_prompt_embeds=no_prompt.expand(2, -1, -1),
            latents=noise * (1 + sigmas[0] ** -2).sqrt(),  # ComfyUI begins with that much noise
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="latent",
        ).images
    model, _ = nodes.apply_contexts(patcher(pair.model), None, tmp_path, contexts)
    found = comfy.sample.sample_custom(
        model,
        noise,
        3.0,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        [[prompt, {}]],
        [[no_prompt, {}]],
        torch.zeros_like(noise),
    )
    found = pair.model.process_latent_in(found)
    print(f"{(found - expected).abs().max():.1e} of {expected.abs().max():.1f}")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def clip_of(**encoders):
    """ComfyUI's CLIP around networks with the weights of some of transformers."""
    comfy = load_comfyui().comfy
    networks = nn.Module()
    for name, encoder in encoders.items():
        network = comfy.clip_model.CLIPTextModel(encoder.config.to_dict(), torch.float32, CPU, torch.nn)
        network.text_model.encoder.load_state_dict(getattr(encoder, "text_model", encoder).encoder.state_dict())
        networks.add_module(name, nn.ModuleDict({"transformer": network}))
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model, clip.patcher = networks, patcher(networks)
    clip.tokenizer, clip.layer_idx, clip.tokenizer_options = None, None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    return clip


def with_text_encoders(folder):
    """An adapter of SDXL with parts for both text encoders: the networks, ComfyUI's MODEL and CLIP."""
    pair, encoders = build("sdxl"), {"text_encoder": _clip(), "text_encoder_2": _clip(projected=True)}
    adapt(pair.theirs, ATTENTION, folder)
    clip = clip_of(clip_l=encoders["text_encoder"], clip_g=encoders["text_encoder_2"])
    for name, encoder in encoders.items():
        adapt(encoder, ["q_proj", "v_proj", "fc1"], folder / name)
    return encoders, patcher(pair.model), clip


def test_text_encoders_are_those_of_transformers_in_a_context(nodes, tmp_path):
    encoders, model, clip = with_text_encoders(tmp_path)
    model, changed = nodes.apply_contexts(model, clip, tmp_path, CONTEXTS[:1])
    assert model.patches
    assert not clip.patcher.patches
    strengths = context_strengths(CausalContextConfig.read(tmp_path, "test"), CONTEXTS[:1])
    for ours, theirs in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        layers = adapted_layers(encoders[ours])
        assert len(layers) == 6
        for path, layer in layers.items():
            name = f"{theirs}.transformer.text_model.{path.removeprefix('text_model.')}.weight"
            expected = layer.get_base_layer().weight + layer.get_delta_weight("default", strengths)
            assert torch.equal(changed.patcher.patch_weight_to_device(name, return_weight=True), expected)


def test_what_does_not_fit_is_refused_before_anything_changes(nodes, tmp_path):
    unet, other = build("sd15"), build("flux")
    adapt(other.theirs, ATTENTION, tmp_path / "flux")
    model = patcher(unet.model)
    refusal = (
        r"flux does not fit this MODEL \(SD15\), which lacks 14 of the 14 modules that it adapts, or has them in "
        r"another size: single_transformer_blocks.0.attn.to_k, .* and 11 more. Connect the model that it was trained"
    )
    with pytest.raises(ValueError, match=refusal):
        nodes.apply_contexts(model, None, tmp_path / "flux", CONTEXTS)
    _, xl, clip = with_text_encoders(tmp_path / "texts")
    with pytest.raises(ValueError, match="adapts text encoders, too. Connect CLIP"):
        nodes.apply_contexts(xl, None, tmp_path / "texts", CONTEXTS[:1])
    with pytest.raises(ValueError, match="read a prompt once for all images of a batch. Give one context"):
        nodes.apply_contexts(xl, clip, tmp_path / "texts", CONTEXTS)
    with pytest.raises(ValueError, match="this MODEL .SDXL., which lacks 6 of the 100 modules .* text_encoder_2.*fc1"):
        nodes.apply_contexts(xl, clip_of(clip_l=_clip()), tmp_path / "texts", CONTEXTS[:1])
    (tmp_path / "texts" / "text_encoder").rename(tmp_path / "texts" / "transformer_2")
    with pytest.raises(
        ValueError, match="adapts transformer_2, too, which are no part of a MODEL or a CLIP. Move their"
    ):
        nodes.apply_contexts(xl, clip, tmp_path / "texts", CONTEXTS[:1])
    assert not model.patches
    assert not xl.patches
    assert not clip.patcher.patches


def run_node(node, model, **inputs):
    """What ComfyUI does with a node of a workflow."""
    execution = load_comfyui().execution
    data, _, v3_data = execution.get_input_data({"model": ["1", 0], **inputs}, node, "2")
    data["model"] = [model]
    (models, clips), *_ = asyncio.run(execution.get_output_data("prompt", "2", node, data, v3_data=v3_data))
    assert clips == [None]
    return models[0]


def test_both_nodes_in_a_workflow(nodes, tmp_path, monkeypatch):
    pair = build("sd15")
    adapt(pair.theirs, ATTENTION, tmp_path / "mine")
    places = nodes.folder_paths.folder_names_and_paths
    monkeypatch.setitem(places, nodes.FOLDER, ([str(tmp_path)], places[nodes.FOLDER][1]))
    (extension,) = [asyncio.run(importlib.import_module("examples.comfyui").comfy_entrypoint())]
    sliders, text = asyncio.run(extension.get_node_list())

    (choice,) = sliders.INPUT_TYPES()["required"]["causal_context"][1]["options"]
    assert choice["key"] == "mine"
    shown = {
        (settings["display_name"], settings["default"], settings["display"])
        for _, settings in choice["inputs"]["required"].values()
    }
    assert shown == {(c, 0.0, "slider") for c in CONCEPTS} | {("observational", 1.0, "slider")}
    strengths = dict(zip(choice["inputs"]["required"], (0.5, 1.0, 0.0, 1.0), strict=True))
    inputs = {"causal_context": "mine"} | {f"causal_context.{slider}": value for slider, value in strengths.items()}

    by_sliders = run_node(sliders, patcher(pair.model), **inputs)
    by_text = run_node(text, patcher(pair.model), adapter=str(tmp_path / "mine"), contexts="thick=0.5+slant\n")
    expected, _ = nodes.apply_contexts(patcher(pair.model), None, tmp_path / "mine", CONTEXTS[:1])
    for model in (by_sliders, by_text):
        assert model.patches.keys() == expected.patches.keys()
        for name in expected.patches:
            weights = [each.patch_weight_to_device(name, return_weight=True) for each in (model, expected)]
            assert torch.equal(*weights)
    batch = run_node(text, patcher(pair.model), adapter=str(tmp_path / "mine"), contexts="thick\n\nslant=2")
    ((wrap,),) = batch.wrappers["apply_model"].values()
    assert len(wrap.loras[0][1]) == 3

    before = sliders.fingerprint_inputs(causal_context={"causal_context": "mine"})
    assert before == text.fingerprint_inputs(adapter=str(tmp_path / "mine"), contexts="")
    (tmp_path / "mine" / "adapter_model.safetensors").touch()
    assert before != sliders.fingerprint_inputs(causal_context={"causal_context": "mine"})


def test_without_adapters_the_sliders_say_so(nodes, tmp_path, monkeypatch):
    monkeypatch.setitem(nodes.folder_paths.folder_names_and_paths, nodes.FOLDER, ([str(tmp_path)], set()))
    (choice,) = nodes.CausalContextSliders.INPUT_TYPES()["required"]["causal_context"][1]["options"]
    assert choice == {"key": "(none in models/causal_context or the cache of the Hub)", "inputs": {"required": {}}}


def test_comfyui_loads_the_folder():
    modules = load_comfyui()
    folder = str(importlib.import_module("examples.comfyui").__path__[0])
    assert asyncio.run(modules.nodes.load_custom_node(folder))
    assert "CausalContextSliders" in modules.nodes.NODE_CLASS_MAPPINGS
    assert "CausalContextText" in modules.nodes.NODE_CLASS_MAPPINGS


@pytest.mark.parametrize(
    ("family", "file_format"),
    [("sd15", "kohya"), ("sdxl", "kohya"), *((name, "diffusers") for name in ("sd3", "flux", "qwen_image", "z_image"))],
)
def test_comfyui_loads_exported_files_whole(tmp_path, family, file_format):
    comfy, pair = load_comfyui().comfy, build(family)
    targets = ATTENTION if family == "sdxl" else pair.targets  # kohya's names have no place for its embeddings
    adapted = adapt(pair.theirs, targets, tmp_path / "adapter")
    pipe = PIPELINES[PIPELINE_OF.get(family, family)]()
    pipe.register_modules(**{"unet" if file_format == "kohya" else "transformer": pair.theirs})
    (file,) = export_contexts(as_base(pipe), [str(CONTEXTS[0])], tmp_path / "loras", file_format=file_format)
    lora = comfy.utils.load_torch_file(str(file))
    model, _ = comfy.sd.load_lora_for_models(patcher(pair.model), None, lora, 1.0, 1.0)
    assert sum(map(len, model.patches.values())) == len(adapted_layers(adapted.get_base_model()))
