"""Casts of a base's stored weights, caches and other hooks of diffusers and accelerate, beside an adapter."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig

from hf_causal_context import intervene, load_context_adapter, unload_context_adapter

from ..adapter.small import Mlp, adapted, inputs
from ..test_pipelines import CLOSE, CONTEXTS, build, denoiser, run, write_adapter
from .test_style_loras import merged, with_style, write_style

FAMILIES = ("stable_diffusion", "flux", "wan")
FP8 = torch.float8_e4m3fn


def stored_in_fp8(pipe, compute_dtype=torch.float32):
    denoiser(pipe).enable_layerwise_casting(storage_dtype=FP8, compute_dtype=compute_dtype)
    return pipe


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """Family, a plain pipeline, one in float32 with the weights that fp8 leaves of its own, and an adapter."""
    plain = build(request.param)
    rounded = copy.deepcopy(plain)
    weights = denoiser(stored_in_fp8(copy.deepcopy(plain))).state_dict()
    assert FP8 in {weight.dtype for weight in weights.values()}
    denoiser(rounded).load_state_dict(weights)
    return request.param, plain, rounded, write_adapter(denoiser(plain), tmp_path_factory.mktemp("a") / "adapter")


@pytest.mark.parametrize("order", ["cast first", "cast last"])
def test_storage_in_fp8_rounds_the_base_alone(made, order):
    name, plain, rounded, folder = made
    pipe = copy.deepcopy(plain)
    if order == "cast first":
        load_context_adapter(stored_in_fp8(pipe), folder)
    else:
        stored_in_fp8(load_context_adapter(pipe, folder))
    stored = {weight.dtype for path, weight in denoiser(pipe).named_parameters() if "causal_context_" in path}
    assert stored == {torch.float32}
    assert torch.equal(run(name, pipe), run(name, rounded))
    expected = load_context_adapter(copy.deepcopy(rounded), folder)
    for context in CONTEXTS[1], CONTEXTS:
        with intervene(pipe, context):
            images = run(name, pipe)
        with intervene(expected, context):
            assert torch.equal(images, run(name, expected))
    assert not torch.equal(images, run(name, rounded))
    unload_context_adapter(pipe)
    assert torch.equal(run(name, pipe), run(name, rounded))


@pytest.mark.parametrize("order", ["cast first", "cast last"])
def test_a_base_that_computes_in_bfloat16(made, order):
    name, plain, rounded, folder = made
    pipe = copy.deepcopy(plain).to(torch.bfloat16)
    if order == "cast first":
        load_context_adapter(stored_in_fp8(pipe, torch.bfloat16), folder)
    else:
        stored_in_fp8(load_context_adapter(pipe, folder), torch.bfloat16)
    exact = load_context_adapter(copy.deepcopy(rounded), folder)
    shape = (2, 16, 2, 8, 8) if name == "wan" else (2, 4, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if name == "flux":
        noise = torch.nn.functional.pixel_unshuffle(noise, 2).flatten(2).mT
    with intervene(pipe, CONTEXTS):
        images = run(name, pipe, latents=noise.bfloat16())
    with intervene(exact, CONTEXTS):
        expected = run(name, exact, latents=noise)
    assert (images - expected).abs().mean() < 0.1 * (run(name, exact, latents=noise) - expected).abs().mean() + 0.02


def test_a_context_cannot_be_merged_into_weights_stored_in_fp8(made):
    _, plain, _, folder = made
    pipe = stored_in_fp8(load_context_adapter(copy.deepcopy(plain), folder))
    with intervene(pipe, CONTEXTS[1]), pytest.raises(ValueError, match="quantized.*float8_e4m3fn.*Keep it as an adap"):
        denoiser(pipe).fuse_lora()


def test_fp8_beside_a_style(made, tmp_path):
    """A LoRA's own weights are rounded, too, as without ours beside it."""
    name, plain, _, folder = made
    style = write_style(plain, tmp_path / "style")
    pipe = stored_in_fp8(load_context_adapter(with_style(copy.deepcopy(plain), style), folder))
    styled = stored_in_fp8(with_style(copy.deepcopy(plain), style))
    assert torch.equal(run(name, pipe), run(name, styled))
    load_context_adapter(styled, folder)
    with intervene(pipe, CONTEXTS), intervene(styled, CONTEXTS):
        assert torch.equal(run(name, pipe), run(name, styled))


@pytest.mark.parametrize("mechanism", ["independent", "reduced", "structural"])
def test_a_part_that_switches_autocast_off(mechanism):
    class Precise(Mlp):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model, x = adapted(Precise(), target_modules=["first", "second"], mechanism=mechanism), inputs(400)
    with torch.no_grad(), intervene(model, "thick"):
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("order", ["cache first", "cache last"])
@pytest.mark.parametrize("threshold", [1e-9, 10.0], ids=["never used", "always used"])
def test_first_block_cache(tmp_path, threshold, order):
    name = "flux"
    plain = build(name)
    folder = write_adapter(denoiser(plain), tmp_path / "adapter")

    def cached(pipe):
        denoiser(pipe).enable_cache(FirstBlockCacheConfig(threshold=threshold))
        return pipe

    pipe = copy.deepcopy(plain)
    if order == "cache first":
        load_context_adapter(cached(pipe), folder)
    else:
        cached(load_context_adapter(pipe, folder))
    assert torch.equal(run(name, pipe), run(name, cached(copy.deepcopy(plain))))
    with intervene(pipe, CONTEXTS[1]):
        images = run(name, pipe)
    torch.testing.assert_close(images, run(name, cached(merged(plain, pipe, CONTEXTS[1]))), **CLOSE)
    with intervene(pipe, CONTEXTS):
        together = run(name, pipe)
    torch.testing.assert_close(together[1:], images[1:], **CLOSE)
    assert (together[:1] - images[:1]).abs().max() > 1e-3


class TestHooksOfAccelerate:
    @pytest.fixture
    def pipe(self):
        return build("stable_diffusion")

    def test_those_that_move_weights_come_after_the_adapter(self, pipe, tmp_path):
        folder = write_adapter(pipe.unet, tmp_path)
        cpu_offload(pipe.unet, torch.device("cpu"))
        with pytest.raises(ValueError, match="are offloaded one by one .*Load the adapter first"):
            load_context_adapter(pipe, folder)

    def test_those_that_move_inputs_only_are_no_offloading(self, pipe, tmp_path):
        folder = write_adapter(pipe.unet, tmp_path)
        expected = load_context_adapter(copy.deepcopy(pipe), folder)
        for module in pipe.unet.modules():
            if isinstance(module, torch.nn.Linear):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        load_context_adapter(pipe, folder)
        with intervene(pipe, CONTEXTS), intervene(expected, CONTEXTS):
            assert torch.equal(run("stable_diffusion", pipe), run("stable_diffusion", expected))
