"""Weights of a base from a GGUF file: train, resume, sample and export as on the weights that the file holds."""

import json
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

from hf_causal_context import causal_effects, intervene, save_baked
from hf_causal_context.bases.language import load_language_model
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.hub import load
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import train_text
from hf_causal_context.training.recipe import KEPT_UNPACKED

from .gguf_files import write, write_denoiser, write_llama
from .small import adapter_weights, assert_close_to_largest, check_commands, settings, write_folders
from .small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def flux(pipeline_folder, tmp_path):
    """A Flux whose attention is wide enough for blocks of eight bits: its folder, and a GGUF file of its weights."""
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder("flux"))
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    pipe.transformer = FluxTransformer2DModel.from_config(config)
    pipe.save_pretrained(tmp_path / "flux")
    return tmp_path / "flux", write_denoiser(tmp_path / "flux-Q8_0.gguf", pipe.transformer)


@pytest.fixture
def llama(tmp_path):
    """A Llama, and a GGUF file of its weights."""
    model = language_model("llama")
    model.save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", write_llama(tmp_path / "llama-Q8_0.gguf", model)


def unpacked(folder, file, to):
    """The same pipeline in full precision, with the values that the file holds."""
    pipe, packed = load_base(str(folder)).pipe, load_base(str(folder), gguf_file=str(file)).pipe
    weights = packed.transformer.state_dict()
    pipe.transformer.load_state_dict({name: dequantize_gguf_tensor(weight) for name, weight in weights.items()})
    pipe.save_pretrained(to)
    return to


def test_the_transformer_is_held_in_the_bits_of_the_file(flux):
    pipe = load_base(str(flux[0]), gguf_file=str(flux[1])).pipe
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.dtype == torch.uint8
    stored = load_base(str(flux[0])).pipe.transformer.transformer_blocks[0].attn.to_q.weight
    assert 0 < (dequantize_gguf_tensor(weight) - stored).abs().max() < 0.01 * stored.abs().max()


def test_training_is_that_on_the_values_of_the_file_and_resumes_exactly(flux, tmp_path, capsys):
    data, (base, file) = write_folders(tmp_path / "data", captions=True), flux
    changes = {"gguf_file": str(file), "resolution": 32, "checkpointing_steps": 2, "max_train_steps": 4}
    folder = train(TrainingArguments(**settings(base, data, tmp_path / "whole", **changes)))
    assert capsys.readouterr().out.count(KEPT_UNPACKED) == 1
    whole = adapter_weights(folder)
    cut = settings(base, data, tmp_path / "cut", **changes)
    train(TrainingArguments(**cut | {"max_train_steps": 2}))
    resumed = adapter_weights(train(TrainingArguments(**cut | {"resume_from_checkpoint": "latest"})))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    rounded = unpacked(base, file, tmp_path / "rounded")
    expected = train(TrainingArguments(**settings(rounded, data, tmp_path / "e", **changes | {"gguf_file": None})))
    assert_close_to_largest(whole, adapter_weights(expected), 1e-3)
    with pytest.raises(ValueError, match="--gguf_file"):
        train(TrainingArguments(**cut | {"gguf_file": None, "resume_from_checkpoint": "latest"}))
    assert json.loads((folder / "training_arguments.json").read_text())["gguf_file"] == str(file)
    assert "| GGUF file of the base's weights | flux-Q8\\_0.gguf |" in (folder / "README.md").read_text()
    assert load(folder).transformer.transformer_blocks[0].attn.to_q.base_layer.weight.dtype == torch.float32


def test_commands_take_it(flux, tmp_path, capsys):
    data, (base, file) = write_folders(tmp_path / "data", captions=True), flux
    adapter = train(TrainingArguments(**settings(base, data, tmp_path / "out", gguf_file=str(file), resolution=32)))
    options = ["--adapter", str(adapter), "--gguf_file", str(file)]
    sampling = ["--num_inference_steps", "1", "--resolution", "32", "--prompt", "a"]
    check_commands(adapter, base, tmp_path, ["--gguf_file", str(file)], sampling)
    pushed = ["--output_dir", str(tmp_path / "hub"), *sampling]
    assert main(["push", *options, *pushed]) == 0
    assert json.loads((tmp_path / "hub" / "training_arguments.json").read_text())["gguf_file"] == file.name
    assert main(["merge", *options, "--context", "thick", "--output_dir", str(tmp_path / "merged")]) == 1
    assert "its base weight is quantized" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_what_the_adapter_does_is_measured_against_the_values_of_the_file(flux, tmp_path):
    data, (base, file) = write_folders(tmp_path / "data", captions=True), flux
    adapter = train(TrainingArguments(**settings(base, data, tmp_path / "out", gguf_file=str(file), resolution=32)))
    rounded = unpacked(base, file, tmp_path / "rounded")
    packed = StoredAdapter.open(adapter).pipeline(gguf_file=str(file)).denoiser
    plain = StoredAdapter.open(adapter, str(rounded)).pipeline().denoiser
    assert torch.allclose(causal_effects(packed).changes, causal_effects(plain).changes, rtol=1e-5)


def test_language_models_take_it(llama, tmp_path, capsys):
    base, file = llama
    given = arguments(tmp_path, pretrained_model_name_or_path=str(base), gguf_file=str(file), max_train_steps=2)
    folder = train_text(given, data=text_data())
    assert KEPT_UNPACKED not in capsys.readouterr().out  # they are unpacked when the file is read
    ids = torch.arange(3, 9)[None]
    packed = load_language_model(str(base), None, torch.float32, gguf_file=str(file))
    difference = (packed(ids).logits - language_model("llama")(ids).logits).abs().max()
    assert 0 < difference < 0.05
    model, _ = StoredAdapter.open(folder).language_model(gguf_file=str(file))
    assert torch.equal(model(ids).logits, packed(ids).logits)
    save_baked(model, "formal", tmp_path / "baked")
    with intervene(model, "formal"):
        expected = model(ids).logits
    merge = ["merge", "--adapter", str(folder), "--gguf_file", str(file), "--context", "formal"]
    assert main([*merge, "--output_dir", str(tmp_path / "merged")]) == 0
    merged = load_language_model(str(tmp_path / "merged"), None, torch.float32)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)


def test_a_file_of_another_model_is_refused(flux, llama, tmp_path):
    weights = {"output.weight": language_model("llama").lm_head.weight}
    part = str(write(tmp_path / "part.gguf", "llama", weights))
    with pytest.raises(ValueError, match=r"part.gguf cannot be read as the weights of .*: it lacks 20 weights"):
        load_language_model(str(llama[0]), None, torch.float32, gguf_file=part)
    with pytest.raises(ValueError, match=r"cannot be read as the weights of transformer \(FluxTransformer2DModel\) of"):
        load_base(str(flux[0]), gguf_file=str(llama[1]))
    (tmp_path / "other.gguf").write_text("weights")
    with pytest.raises(ValueError, match="other.gguf is no GGUF file. Give one whose name ends with .gguf"):
        load_base(str(flux[0]), gguf_file=str(tmp_path / "other.gguf"))


@pytest.mark.parametrize(
    ("family", "has"), [("cogview4", "a CogView4Transformer2DModel"), ("stable_diffusion", "none")]
)
def test_a_pipeline_that_has_no_such_files_is_refused(pipeline_folder, flux, family, has):
    with pytest.raises(ValueError, match=f"--gguf_file.*and .*Pipeline has {has}. Leave it out, or give --quant"):
        load_base(str(pipeline_folder(family)), gguf_file=str(flux[1]))


def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="--gguf_file=a.gguf needs gguf: pip install gguf"):
        TrainingArguments(pretrained_model_name_or_path="x", output_dir=str(tmp_path), gguf_file="a.gguf")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gguf_file": "user/name/a.gguf", "quantization": "int8"}, ValueError, "Leave one of them out"),
        ({"gguf_file": "user/name/a.gguf", "shard_base": True}, ValueError, "--gguf_file and --shard_base"),
        ({"gguf_file": "a.gguf"}, FileNotFoundError, "--gguf_file=a.gguf does not exist. Give a path, or user/"),
        ({"gguf_file": "/no/such/a.gguf"}, FileNotFoundError, "--gguf_file=/no/such/a.gguf does not exist"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        TrainingArguments(pretrained_model_name_or_path="x", output_dir=str(tmp_path), **changes)
