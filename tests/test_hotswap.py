"""`load_context_adapter(..., hotswap=True)`: another adapter in the same tensors, or a refusal that changes nothing."""

import gc
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from hf_causal_context import AdapterError, intervene, load_context_adapter, unload_context_adapter
from hf_causal_context.adapter.layer import CausalContextLayer
from hf_causal_context.adapter.lookup import conditionings

from .test_pipelines import build, run, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIONS = {"concepts": ("thick", "slant"), "target_modules": ["to_q", "to_v"], "concept_rank": 2}
CONTEXT = {"thick": 1.0, "slant": -0.5}


def images(pipe):
    with intervene(pipe, CONTEXT):
        return run("ddim", pipe)


def changed(folder, other, factor=-2.0, **fields):
    """A copy with other weights, and with other fields in the config."""
    other.mkdir()
    weights = {name: factor * weight for name, weight in load_file(folder / WEIGHTS).items()}
    save_file(weights, other / WEIGHTS)
    (other / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | fields))
    return other


@pytest.fixture(params=["independent", "reduced"])
def first(request, tmp_path):
    return write_adapter(build("ddim").unet, tmp_path / "first", mechanism=request.param, **OPTIONS)


@pytest.fixture
def second(first, tmp_path):
    return changed(first, tmp_path / "second", base_model_name_or_path="user/second")


def test_the_other_adapter_is_in_place_as_if_it_had_been_loaded(first, second, tmp_path):
    expected = images(load_context_adapter(build("ddim"), second))
    pipe = load_context_adapter(build("ddim"), first)
    parameters = {name: (id(p), p.data_ptr()) for name, p in pipe.unet.named_parameters()}
    before = images(pipe)
    assert load_context_adapter(pipe, second, hotswap=True) is pipe
    assert {name: (id(p), p.data_ptr()) for name, p in pipe.unet.named_parameters()} == parameters
    assert torch.equal(images(pipe), expected)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert pipe.unet.peft_config["default"].base_model_name_or_path == "user/second"
    assert not any(p.requires_grad for name, p in pipe.unet.named_parameters() if "causal_context" in name)
    with intervene(pipe, CONTEXT):  # a block that is open sees the new weights
        load_context_adapter(pipe, first, hotswap=True)
        assert torch.equal(run("ddim", pipe), before)
    unload_context_adapter(pipe)
    assert torch.equal(run("ddim", pipe), run("ddim", build("ddim")))


def test_between_two_steps_of_a_call_the_rest_is_of_the_other_adapter(first, second):
    def sampled(swap):
        pipe, steps = load_context_adapter(build("ddim"), first), []

        def before_a_step(*_):
            steps.append(None)
            if len(steps) == 2:
                swap(pipe)

        pipe.unet.register_forward_pre_hook(before_a_step, prepend=True)
        return images(pipe)

    def afresh(pipe):
        load_context_adapter(pipe, second, hotswap=True)
        for conditioning in conditionings(pipe):
            conditioning.request().matrices.clear()

    assert torch.equal(sampled(lambda pipe: load_context_adapter(pipe, second, hotswap=True)), sampled(afresh))


def test_a_dial_turns_by_the_calibration_of_the_adapter_that_came(first, tmp_path):
    def dialed(strength):
        return {"calibration": {"thick": [[0, 0], [0.5, strength], [1, 1]]}}

    old, new = changed(first, tmp_path / "old", **dialed(0.1)), changed(first, tmp_path / "new", **dialed(0.9))
    pipe = load_context_adapter(build("ddim"), old)
    load_context_adapter(pipe, new, hotswap=True)
    with intervene(pipe, {"thick": 0.5}, calibrated=True):
        found = run("ddim", pipe)
    with intervene(pipe, {"thick": 0.9}):
        assert torch.equal(found, run("ddim", pipe))


def test_one_of_two_adapters_is_swapped(first, second):
    pipe = load_context_adapter(build("ddim"), first, "one")
    load_context_adapter(pipe, first, "two")
    load_context_adapter(pipe, second, "two", hotswap=True)
    with intervene(pipe, CONTEXT, adapter_name="one"):
        kept = run("ddim", pipe)
    with intervene(pipe, CONTEXT, adapter_name="two"):
        swapped = run("ddim", pipe)
    torch.testing.assert_close(kept, images(load_context_adapter(build("ddim"), first)))
    torch.testing.assert_close(swapped, images(load_context_adapter(build("ddim"), second)))


def test_text_encoders_are_swapped_with_the_denoiser(tmp_path):
    pipe = build("stable_diffusion")
    text = OPTIONS | {"target_modules": ["q_proj"]}
    first = write_adapter(pipe.unet, tmp_path / "first", **OPTIONS)
    write_adapter(pipe.text_encoder, first / "text_encoder", **text)
    second = changed(first, tmp_path / "second")
    load_context_adapter(pipe, first)
    with pytest.raises(ValueError, match="it adapts 'unet', the loaded one 'text_encoder', 'unet'"):
        load_context_adapter(pipe, second, hotswap=True)
    changed(first / "text_encoder", second / "text_encoder")
    load_context_adapter(pipe, second, hotswap=True)
    fresh = load_context_adapter(build("stable_diffusion"), second)
    for component in ("unet", "text_encoder"):
        expected = getattr(fresh, component).state_dict()
        for name, weight in getattr(pipe, component).state_dict().items():
            assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": ("thick", "size")}, r"concepts=\('thick', 'size'\), and \('thick', 'slant'\) of the loaded one"),
        ({"concepts": ("slant", "thick")}, r"concepts=\('slant', 'thick'\)"),
        ({"concept_rank": 3}, "concept_rank=3, and 2 of the loaded one"),
        ({"observational_rank": 1}, "observational_rank=1, and 8"),
        ({"rank_pattern": {"to_q": 1}}, r"rank_pattern=\{'to_q': 1\}"),
        ({"alpha": 4.0}, "alpha=4.0, and 1.0"),
        ({"mechanism": "structural"}, "mechanism='structural', and 'independent'"),
        ({"expressive_depth": 1}, "expressive_depth=1, and 0"),
        ({"target_modules": ["to_q"]}, "it has no 'down_blocks.*to_v.causal_context_down.weight'"),
        ({"target_modules": ["to_q", "to_v", "to_k"]}, "the loaded one has no 'down_blocks.*to_k.causal_context"),
        ({"modules_to_save": ["conv_out"]}, "the loaded one has no 'conv_out.bias'"),
    ],
)
def test_another_configuration_is_refused_before_anything_changes(options, message, tmp_path):
    first = write_adapter(build("ddim").unet, tmp_path / "first", **OPTIONS)
    other = write_adapter(build("ddim").unet, tmp_path / "other", **OPTIONS | options)
    pipe = load_context_adapter(build("ddim"), first)
    before = images(pipe)
    with pytest.raises(ValueError, match=f"cannot be swapped in for adapter 'default', .*{message}"):
        load_context_adapter(pipe, other, hotswap=True)
    assert torch.equal(images(pipe), before)
    assert pipe.unet.peft_config["default"].concepts == OPTIONS["concepts"]


def test_what_cannot_be_swapped_is_refused_before_anything_changes(first, second, tmp_path):
    pipe = build("ddim")
    with pytest.raises(ValueError, match="replaces a loaded adapter, and the pipeline has none of the name 'default'"):
        load_context_adapter(pipe, first, hotswap=True)
    load_context_adapter(pipe, first)
    before = images(pipe)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        load_context_adapter(pipe, changed(first, tmp_path / "nan", float("nan")), hotswap=True)
    assert torch.equal(images(pipe), before)
    with intervene(pipe, CONTEXT):
        for layer in pipe.unet.modules():
            if isinstance(layer, CausalContextLayer):
                layer.merge(adapter_names=["default"])
    with pytest.raises(ValueError, match="is merged into the weights of pipe.unet, so it cannot be swapped"):
        load_context_adapter(pipe, second, hotswap=True)


@pytest.mark.slow
def test_a_hundred_swaps_leave_nothing_behind(first, second):
    pipe = load_context_adapter(build("ddim"), first)

    def count():
        gc.collect()
        alive = gc.get_objects()
        kinds = (torch.Tensor, torch.nn.Module, CausalContextLayer)
        return [sum(isinstance(each, kind) for each in alive) for kind in kinds], len(alive)

    def swap_twice():
        load_context_adapter(pipe, second, hotswap=True)
        load_context_adapter(pipe, first, hotswap=True)
        images(pipe)

    for _ in range(2):  # what libraries note once
        swap_twice()
        exact, everything = count()
    for _ in range(50):
        swap_twice()
    exact_after, everything_after = count()
    assert exact_after == exact
    assert everything_after - everything < 50  # less than one for each two swaps


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_denoiser_is_not_compiled_again(first, second, whole):
    expected = images(load_context_adapter(build("ddim"), second))
    pipe = load_context_adapter(build("ddim"), first)
    if whole:
        pipe.unet.compile(backend="aot_eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    before = images(pipe)
    images(pipe)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for adapter in (second, first, second):
            load_context_adapter(pipe, adapter, hotswap=True)
            found = images(pipe)
    assert not counters["stats"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-3)


def test_a_swap_keeps_the_dtype_of_the_pipeline(first, second):
    pipe = load_context_adapter(build("ddim").to(torch.bfloat16), first)
    dtypes = {name: p.dtype for name, p in pipe.unet.named_parameters()}
    load_context_adapter(pipe, second, hotswap=True)
    assert {name: p.dtype for name, p in pipe.unet.named_parameters()} == dtypes
    assert isinstance(pipe, diffusers.DDIMPipeline)
