"""Adapters in diffusers' modular pipelines, whose calls take their inputs without names of their own."""

import types

import diffusers
import pytest
import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines import ComponentsManager
from diffusers.modular_pipelines.wan import encoders as wan_encoders

from hf_causal_context import intervene, load_context_adapter, unload_context_adapter

from .test_pipelines import ATTENTION_KWARGS, CLOSE, CONTEXTS, build, denoiser, write_adapter

STOCK = {
    "stable_diffusion_xl": "StableDiffusionXL",
    "flux": "Flux",
    "qwen_image": "QwenImage",
    "z_image": "ZImage",
    "wan": "Wan",
}
# Its blocks embed the time once for all rows, which cannot have different contexts then.
WITHOUT = {"flux": {"exclude_modules": r"time_text_embed\.(timestep|guidance)_embedder.*"}}


@pytest.fixture(autouse=True)
def _clean_texts(monkeypatch):
    """Wan's blocks want ftfy, which stock pipelines do without."""
    monkeypatch.setattr(wan_encoders, "ftfy", types.SimpleNamespace(fix_text=lambda text: text), raising=False)


def modular(name):
    """The modular pipeline of a family, with the tiny parts of the stock one."""
    parts = build(name).components
    pipe = getattr(diffusers, f"{STOCK[name]}ModularPipeline")()
    pipe.update_components(**{part: parts[part] for part in parts if part in pipe.components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name, pipe, rows=(0, 1), copies=2, **inputs):
    """Images (or videos) for some of two prompts, each with noise of its own."""
    # Of several images per prompt, the blocks of SDXL pair one's pooled text with another's.
    prompts = ["two cats", "two cats" if name == "stable_diffusion_xl" else "two dogs"]
    inputs |= {"prompt": [prompts[row] for row in rows], "num_inference_steps": 2, "height": 16, "width": 16}
    inputs |= {"generator": [torch.Generator().manual_seed(10 * row + i) for row in rows for i in range(copies)]}
    if name == "wan":
        inputs |= {"num_frames": 5, "num_videos_per_prompt": copies}
    else:
        inputs |= {"num_images_per_prompt": copies}
    if name != "flux":
        inputs["negative_prompt"] = ["blurred"] * len(rows)
    return torch.as_tensor(pipe(**inputs, output_type="np", output="videos" if name == "wan" else "images"))


@pytest.fixture(params=STOCK)
def name(request):
    return request.param


@pytest.fixture
def loaded(name, tmp_path):
    """A modular pipeline with an adapter, and what it makes without."""
    pipe = modular(name)
    plain = run(name, pipe)
    return load_context_adapter(
        pipe, write_adapter(denoiser(pipe), tmp_path / "adapter", **WITHOUT.get(name, {}))
    ), plain


def test_mixed_prompts_are_separate_runs_and_without_a_context_it_is_the_base(name, loaded):
    pipe, plain = loaded
    assert torch.equal(run(name, pipe), plain)
    with intervene(pipe, CONTEXTS):
        mixed = run(name, pipe)
    for row, context in enumerate(CONTEXTS):
        with intervene(pipe, context):
            alone = run(name, pipe, rows=(row,))
        torch.testing.assert_close(mixed.chunk(2)[row], alone, **CLOSE)
        assert (alone - plain.chunk(2)[row]).abs().max() > 1e-2
    per_image = [CONTEXTS[0], CONTEXTS[1], CONTEXTS[1], CONTEXTS[0]]
    with intervene(pipe, per_image):
        assert torch.equal(run(name, pipe)[[0, 2]], mixed[[0, 2]])
    with intervene(pipe, [*CONTEXTS, "thick"]), pytest.raises(ValueError, match="called with 2 prompts"):
        run(name, pipe)


def test_a_context_among_the_inputs(name, loaded):
    pipe, _ = loaded
    argument = ATTENTION_KWARGS[name]
    if argument not in pipe.blocks.input_names:
        pytest.skip(f"{STOCK[name]} has no such input")
    with intervene(pipe, CONTEXTS):
        expected = run(name, pipe)
    assert torch.equal(run(name, pipe, **{argument: {"context": CONTEXTS}}), expected)


def test_unloading_leaves_no_trace(name, loaded):
    pipe, plain = loaded
    assert type(pipe).__name__ == f"{STOCK[name]}ModularPipeline"
    unload_context_adapter(pipe)
    assert type(pipe) is getattr(diffusers, f"{STOCK[name]}ModularPipeline")
    assert torch.equal(run(name, pipe), plain)
    with pytest.raises(ValueError, match="No component of .* has a causal context adapter"):
        intervene(pipe, "thick")


def test_blocks_that_run_one_after_the_other(tmp_path):
    """Texts are encoded by a pipeline of its own; the next one gets their embeddings, or the state."""
    name = "qwen_image"
    pipe = modular(name)
    load_context_adapter(pipe, write_adapter(denoiser(pipe), tmp_path / "adapter"))
    with intervene(pipe, CONTEXTS):
        whole = run(name, pipe)
    blocks = pipe.blocks.get_workflow("text2image")
    text = blocks.sub_blocks.pop("text_encoder")
    encode, rest = (part.init_pipeline(components_manager=ComponentsManager()) for part in (text, blocks))
    for part in (encode, rest):
        part.update_components(**{key: value for key, value in pipe.components.items() if key in part.components})
    state = encode(prompt=["two cats", "two dogs"], negative_prompt=["blurred"] * 2)
    inputs = {"num_inference_steps": 2, "height": 16, "width": 16, "num_images_per_prompt": 2, "output_type": "np"}
    embeddings = state.get_by_kwargs("denoiser_input_fields")
    assert "prompt_embeds" in embeddings
    for given in ({"state": state}, embeddings):
        generators = [torch.Generator().manual_seed(10 * row + i) for row in (0, 1) for i in (0, 1)]
        with intervene(rest, CONTEXTS):
            images = rest(**given, **inputs, generator=generators, output="images")
        torch.testing.assert_close(torch.as_tensor(images), whole)


def test_saved_with_its_adapter_and_loaded_again(tmp_path):
    name = "z_image"
    pipe = modular(name)
    load_context_adapter(pipe, write_adapter(denoiser(pipe), tmp_path / "adapter"))
    with intervene(pipe, CONTEXTS):
        expected = run(name, pipe)
    with pytest.warns(UserWarning, match="saved without its causal context adapter"):
        pipe.save_pretrained(str(tmp_path / "pipe"), overwrite_modular_index=True)
    again = ModularPipeline.from_pretrained(tmp_path / "pipe")
    again.load_components()
    again.set_progress_bar_config(disable=True)
    load_context_adapter(again, tmp_path / "pipe")
    with intervene(again, CONTEXTS):
        torch.testing.assert_close(run(name, again), expected)


def test_before_its_components_are_loaded(tmp_path):
    folder = write_adapter(build("z_image").transformer, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has no networks yet. Load them first: pipe.load_components\(\)"):
        load_context_adapter(diffusers.ZImageModularPipeline(), folder)


def test_an_adapter_of_another_family(tmp_path):
    folder = write_adapter(build("flux").transformer, tmp_path / "adapter")
    with pytest.raises(ValueError, match="needs a FluxTransformer2DModel, which ZImageModularPipeline does not have"):
        load_context_adapter(modular("z_image"), folder)
