"""Adapters from a stranger: what is wrong is refused, by every route; what was right once, loads for ever."""

import copy
import json
import os
import re
import shutil
import struct

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_causal_context import AdapterError, CausalContextConfig, load_context_adapter, unload_context_adapter
from hf_causal_context.adapter.storage.files import read_header, read_weights
from hf_causal_context.inference.adapted import StoredAdapter

from ..training.small_language import word_tokenizer
from .fixtures.adapters import ADAPTERS, FOLDER, outputs
from .small import Mlp
from .stored_copies import base_for, edit, edit_weights, pipeline, refused

STORED = sorted(path.name for path in FOLDER.glob("format_*"))
NAMES = ("unet_reduced", "unet_structural")


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    """A copy of a stored adapter of a UNet."""
    return shutil.copytree(FOLDER / f"format_1_{request.param}", tmp_path / request.param)


@pytest.fixture
def reduced(tmp_path):
    return shutil.copytree(FOLDER / "format_1_unet_reduced", tmp_path / "reduced")


class TestEveryVersionOfTheFormat:
    def test_there_are_some(self):
        assert {name.split("_", 2)[2] for name in STORED} == set(ADAPTERS)
        assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 150_000

    @pytest.mark.parametrize("name", STORED)
    def test_peft_loads_it(self, name):
        model = PeftModel.from_pretrained(base_for(name), FOLDER / name)
        self.check(model, name)

    @pytest.mark.parametrize("name", [name for name in STORED if "unet" in name])
    def test_a_pipeline_loads_it(self, name):
        pipe = load_context_adapter(pipeline(base_for(name)), FOLDER / name)
        self.check(pipe.unet, name)
        unload_context_adapter(pipe)
        plain = base_for(name).state_dict()
        assert all(torch.equal(value, plain[key]) for key, value in pipe.unet.state_dict().items())

    @pytest.mark.parametrize("name", STORED)
    def test_with_its_base(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        model = base_for(name)
        if "unet" in name:
            pipeline(model).save_pretrained(tmp_path)
            self.check(StoredAdapter.open(FOLDER / name, str(tmp_path)).pipeline().pipe.unet, name)
        else:
            model.save_pretrained(tmp_path)
            word_tokenizer().save_pretrained(tmp_path)
            self.check(StoredAdapter.open(FOLDER / name, str(tmp_path)).language_model()[0], name)

    def check(self, model, name):
        expected = load_file(FOLDER / name / "expected.safetensors")
        for context, output in outputs(model).items():
            torch.testing.assert_close(output, expected[context], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected["single"], expected["composed"], atol=1e-3)

    @pytest.mark.parametrize("name", STORED)
    def test_optional_fields_may_be_missing(self, name, tmp_path):
        folder = shutil.copytree(FOLDER / name, tmp_path / name)
        path = folder / "adapter_config.json"
        given = json.loads(path.read_text())
        defaults = CausalContextConfig(concepts=("a",)).to_dict() | {"target_modules": [], "inference_mode": True}
        kept = {key: value for key, value in given.items() if value != defaults[key] or key == "peft_type"}
        assert "format_version" not in kept
        path.write_text(json.dumps(kept))
        self.check(PeftModel.from_pretrained(base_for(name), folder), name)
        assert CausalContextConfig.read(folder, "it").concepts == ("thick", "slant", "size")

    def test_a_newer_version(self, folder, tmp_path):
        edit(folder, format_version=2, concepts={"thick": {}}, surprise=[1])
        message = "format version 2; the installed hf_causal_context reads up to 1. Upgrade it: pip install"
        refused(folder, message)
        unet = base_for("format_1_unet_reduced")
        for load in (
            lambda: PeftModel.from_pretrained(unet, folder),
            lambda: PeftConfig.from_pretrained(folder),
            lambda: AutoPeftModel.from_pretrained(folder),
            lambda: CausalContextConfig.from_pretrained(folder),
            lambda: StoredAdapter.open(folder),
        ):
            with pytest.raises(ValueError, match=message):
                load()


class TestWeights:
    def test_no_pickle(self, folder):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        refused(folder, "a pickle file, which can run code when it is read. Adapters are read from safetensors only")
        (folder / "adapter_model.bin").unlink()
        refused(folder, "has no adapter_model.safetensors")

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda data: b"", "its header has no possible length"),
            (lambda data: data[:5], "its header has no possible length"),
            (lambda data: data[:-1], "is damaged"),
            (lambda data: data + b"\0", "is damaged"),
            (lambda data: struct.pack("<Q", 2**60) + data[8:], "its header has no possible length"),
            (lambda data: struct.pack("<Q", 20) + data[8:], "is damaged"),
            (lambda data: data[:8] + b"\xff" * 40 + data[48:], "is damaged"),
            (lambda data: re.sub(rb'"data_offsets":\[0,(\d)', rb'"data_offsets":[1,\1', data, count=1), "is damaged"),
            (lambda data: re.sub(rb'"dtype":"F32"', rb'"dtype":"X32"', data, count=1), "is damaged"),
        ],
        ids=range(9),
    )
    def test_damaged_files(self, folder, damage, message):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        refused(folder, message)
        with pytest.raises(AdapterError, match=message):
            PeftModel.from_pretrained(Mlp(), folder)

    def test_values(self, folder):
        key = next(key for key in load_file(folder / "adapter_model.safetensors") if key.endswith("up.weight"))
        name = re.escape(key.removeprefix("base_model.model."))
        for value, message in (
            (float("nan"), "NaN or infinite values"),
            (float("-inf"), "NaN or infinite values"),
            (1e30, r"values as large as 1e\+30"),
        ):
            edit_weights(folder, lambda weights, value=value: weights[key].view(-1)[-1:].fill_(value))
            refused(folder, f"the tensor '{name}' holds {message}. The file is damaged, or the training diverged")

    def test_values_that_another_precision_cannot_hold(self, folder):
        edit_weights(folder, lambda weights: next(iter(weights.values())).fill_(1e5))
        refused(folder, r"values as large as 1e\+05")
        model = PeftModel.from_pretrained(base_for("format_1_unet_reduced"), folder).half()
        weights = {key: weight * 2 for key, weight in load_file(folder / "adapter_model.safetensors").items()}
        next(weight for key, weight in weights.items() if "causal_context" in key).fill_(1e5)
        with pytest.raises(AdapterError, match="NaN or infinite values, or values too large for torch.float16"):
            set_peft_model_state_dict(model, weights)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bool])
    def test_types(self, folder, dtype):
        key = next(key for key in load_file(folder / "adapter_model.safetensors") if key.endswith("up.weight"))
        edit_weights(folder, lambda weights: weights.update({key: weights[key].to(dtype)}))
        refused(folder, "is not of a floating-point type")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_precisions(self, folder, dtype):
        edit_weights(folder, lambda weights: weights.update({key: weight.to(dtype) for key, weight in weights.items()}))
        pipe = load_context_adapter(pipeline(base_for(f"format_1_{folder.name}")), folder)
        assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}

    def test_names(self, folder):
        original = load_file(folder / "adapter_model.safetensors")

        def stored(**changes):
            weights = {**original, **changes}
            save_file({key: weight for key, weight in weights.items() if weight is not None}, path)

        path = folder / "adapter_model.safetensors"
        ours = [key for key in original if "causal_context" in key]
        for key in ours:
            stored(**{key: None})
            refused(folder, "is not whole: it lacks 1 weights that its config asks for, such as")
        module = ours[0].split(".causal_context")[0]
        stored(**{key: None for key in ours if key.startswith(module)})
        refused(folder, "is not whole: it lacks . weights that its config asks for, such as")
        stored(**{"base_model.model.conv_in.weight": torch.zeros(8, 1, 3, 3)})
        refused(folder, "'conv_in.weight', which is no weight of the adapter: it could replace one of the base model")
        stored(**{"base_model.model.conv_in.base_layer.weight": torch.zeros(8, 1, 3, 3)})
        refused(folder, "which is no weight of the adapter: it could replace one of the base model")
        stored(**{f"{module}.causal_context_side.weight": torch.zeros(1)})
        refused(folder, "causal_context_side.weight', which its config does not ask for")
        elsewhere = {key.replace(module, f"{module}x"): original[key].clone() for key in ours if key.startswith(module)}
        stored(**elsewhere)
        refused(folder, "does not fit this UNet2DModel: it has weights for '.*x', which is not there")
        inputs = next(original[key] for key in ours if key.endswith("down.weight") and "to_q" in key)
        rank = inputs.shape[0]
        stored(
            **{
                f"base_model.model.time_embedding.linear_1.{key.split('.')[-2]}.weight": torch.zeros(shape)
                for key, shape in (("causal_context_down.weight", (rank, 8)), ("causal_context_up.weight", (32, rank)))
            }
        )
        refused(folder, "is not whole|which its config does not ask for")

    def test_shapes(self, folder):
        original = load_file(folder / "adapter_model.safetensors")
        for key, weight in list(original.items())[::3]:
            for change in (lambda w: w[:-1], lambda w: w[..., :-1], lambda w: w[None], lambda w: w.flatten()[:0]):
                changed = change(weight).contiguous()
                save_file({**original, key: changed}, folder / "adapter_model.safetensors")
                refused(folder, "the shape|is not whole|features there|takes inputs of size")

    def test_a_config_that_asks_for_more_than_the_file_holds(self, reduced):
        def peft():
            PeftModel.from_pretrained(base_for("format_1_unet_reduced"), reduced)

        for changes in ({"concept_rank": 1_365}, {"expressive_depth": 16}, {"mechanism": "structural"}):
            edit(shutil.copytree(FOLDER / "format_1_unet_reduced", reduced, dirs_exist_ok=True), **changes)
            refused(reduced, "the tensor .* has the shape|does not ask for|is not whole")
            with pytest.raises(AdapterError, match="the tensor .* has the shape|does not ask for|is not whole"):
                peft()
        edit(reduced, concept_rank=2, expressive_depth=1, mechanism="reduced", target_modules="all-linear")
        refused(reduced, "does not ask for|is not whole")

    def test_what_fails_while_it_is_attached_is_taken_off_again(self, folder, monkeypatch):
        def fail(*args, **kwargs):
            raise AdapterError("in the middle")

        monkeypatch.setattr("hf_causal_context.inference.pipelines.set_peft_model_state_dict", fail)
        refused(folder, "in the middle")

    def test_nothing_outside_the_folder(self, reduced, tmp_path):
        cache = tmp_path / "blobs"
        cache.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):  # as the cache of the Hub has them
            (reduced / name).rename(cache / name)
            (reduced / name).symlink_to(cache / name)
        load_context_adapter(pipeline(base_for("format_1_unet_reduced")), reduced)
        secret = tmp_path / "secret"
        secret.write_text("the secret words")
        (reduced / "adapter_model.safetensors").unlink()
        (reduced / "adapter_model.safetensors").symlink_to(secret)
        with pytest.raises(AdapterError, match="is damaged") as caught:
            load_context_adapter(pipeline(base_for("format_1_unet_reduced")), reduced)
        assert "words" not in str(caught.value)
        (reduced / "adapter_model.safetensors").unlink()
        os.mkfifo(reduced / "adapter_model.safetensors")  # reading it would wait for ever
        with pytest.raises(AdapterError, match="has no adapter_model.safetensors"):
            load_context_adapter(pipeline(base_for("format_1_unet_reduced")), reduced)


class TestPeftsOwnRoute:
    """What PEFT itself reads, or is told to load."""

    @pytest.fixture
    def adapter(self, tmp_path):
        torch.manual_seed(0)
        options = {"concepts": ("a", "b"), "mechanism": "reduced", "init_weights": False}
        config = CausalContextConfig(**options, target_modules=["first", "second"])
        get_peft_model(Mlp(), config).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_values(self, adapter, low_cpu_mem_usage):
        for value in (float("nan"), float("inf")):
            edit_weights(adapter, lambda weights, value=value: next(iter(weights.values())).view(-1)[-1:].fill_(value))
            with pytest.raises(AdapterError, match="'.*causal_context.*default.*' holds NaN or infinite values"):
                PeftModel.from_pretrained(Mlp(), adapter, low_cpu_mem_usage=low_cpu_mem_usage)

    def test_shapes_and_names(self, adapter):
        edit_weights(adapter, lambda weights: weights.popitem())
        with pytest.raises(AdapterError, match="is not whole"):
            PeftModel.from_pretrained(Mlp(), adapter)

    @pytest.mark.parametrize("module", ["first", "second"])
    def test_a_whole_layer_is_missing(self, adapter, module):
        def drop(weights):
            for key in [key for key in weights if f".{module}." in key]:
                del weights[key]

        edit_weights(adapter, drop)
        for low in (False, True):
            with pytest.raises(AdapterError, match=f"is not whole: it lacks '.*{module}.causal_context_down.default.w"):
                PeftModel.from_pretrained(Mlp(), adapter, low_cpu_mem_usage=low)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_a_base_with_fewer_layers(self, adapter, low_cpu_mem_usage):
        base = Mlp()
        base.last = base.second
        del base.second
        with pytest.raises(AdapterError, match="has '.*second.causal_context_.*', and the model has no adapted module"):
            PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low_cpu_mem_usage)

    def test_states_given_to_a_model(self, adapter):
        model = PeftModel.from_pretrained(Mlp(), adapter)
        weights = load_file(adapter / "adapter_model.safetensors")
        for key in weights:
            with pytest.raises(AdapterError, match="is not whole: it lacks"):
                set_peft_model_state_dict(model, {name: weight for name, weight in weights.items() if name != key})
            with pytest.raises(AdapterError, match="is of type torch.int64"):
                set_peft_model_state_dict(model, {**weights, key: weights[key].long()})
            with pytest.raises(AdapterError, match="NaN or infinite"):
                set_peft_model_state_dict(model, {**weights, key: weights[key] * float("nan")})
        with pytest.raises(RuntimeError, match="size mismatch"):
            set_peft_model_state_dict(model, {key: weight[:1] for key, weight in weights.items()})

    def test_legitimate_states_are_loaded(self, adapter):
        model = PeftModel.from_pretrained(Mlp(), adapter)
        model.load_adapter(adapter, "other")
        weights = {key: weight * 2 for key, weight in load_file(adapter / "adapter_model.safetensors").items()}
        set_peft_model_state_dict(model, weights, "other")  # one of two adapters
        first = model.get_base_model().first
        assert torch.equal(first.causal_context_up["other"].weight, 2 * first.causal_context_up["default"].weight)
        model.load_state_dict(model.state_dict())
        base = {key: value for key, value in model.state_dict().items() if "causal_context" not in key}
        model.load_state_dict(base, strict=False)
        copied = copy.deepcopy(model)
        copied.load_state_dict(model.state_dict())

    def test_modules_that_the_config_leaves_out(self, adapter):
        edit(adapter, target_modules=["first"])
        with pytest.raises(AdapterError, match="has weights for 'second', which its config does not ask for"):
            PeftModel.from_pretrained(Mlp(), adapter)
        edit(adapter, target_modules="fi.*|second", exclude_modules="second")
        with pytest.raises(AdapterError, match="has weights for 'second', which its config does not ask for"):
            PeftModel.from_pretrained(Mlp(), adapter)

    def test_names_that_peft_would_leave_out(self, adapter):
        def strip(weights):
            for key in list(weights):
                weights[key.removeprefix("base_model.model.")] = weights.pop(key)

        edit_weights(adapter, strip)
        with pytest.raises(AdapterError, match="the name '.*' of a tensor does not begin with base_model.model"):
            PeftModel.from_pretrained(Mlp(), adapter)

    def test_another_kind(self, adapter, tmp_path):
        get_peft_model(Mlp(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "lora")
        with pytest.raises(AdapterError, match="is a LORA adapter"):
            CausalContextConfig.from_pretrained(tmp_path / "lora")
        PeftModel.from_pretrained(Mlp(), tmp_path / "lora")

    def test_weights_of_the_base_in_the_file(self, adapter):
        edit_weights(
            adapter, lambda weights: weights.update({"base_model.model.first.base_layer.weight": torch.ones(16, 10)})
        )
        with pytest.raises(AdapterError, match="it could replace one of the base model"):
            PeftModel.from_pretrained(Mlp(), adapter)


def test_what_is_read(folder):
    config = CausalContextConfig.read(folder, "it")
    header, weights = read_header(folder, config.layout(), "it"), read_weights(folder, "it")
    assert {name: tensor.shape for name, tensor in header.items()} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    assert not any(name.startswith("base_model") for name in header)
