"""Bases with weights of fewer bits: train, resume, sample and export as the same weights in full precision."""

import sys

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight

from hf_causal_context import causal_effects, save_baked
from hf_causal_context.bases.language import load_language_model
from hf_causal_context.bases.loading import load_base
from hf_causal_context.bases.quantization import quantization_config
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import train_text
from hf_causal_context.training.recipe import KEPT_UNPACKED

from .small import adapter_weights, assert_close_to_largest, check_commands, settings, write_folders
from .small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = [pytest.mark.usefixtures("on_cpu"), pytest.mark.filterwarnings("ignore:.*prepare_for_inference")]


@pytest.fixture(params=["int8", "fp8"])
def quantization(request):
    return request.param


def dequantized(base, quantization, folder):
    """The base in full precision, with the values that quantization leaves."""
    pipe, small = load_base(str(base)).pipe, load_base(str(base), quantization=quantization).pipe
    for name in ("transformer", "text_encoder_3"):
        for module, same in zip(getattr(pipe, name).modules(), getattr(small, name).modules(), strict=True):
            if isinstance(module, torch.nn.Linear):
                module.weight.data = same.weight.dequantize() if hasattr(same.weight, "dequantize") else same.weight
    pipe.save_pretrained(folder)
    return folder


def test_the_denoiser_and_large_encoders_are_quantized(pipeline_folder, quantization):
    pipe = load_base(str(pipeline_folder("stable_diffusion_3")), quantization=quantization).pipe
    for name, smaller in {"transformer": True, "text_encoder_3": True, "text_encoder": False, "vae": False}.items():
        linear = next(module for module in getattr(pipe, name).modules() if isinstance(module, torch.nn.Linear))
        assert (type(linear.weight.data) is not torch.Tensor) is smaller, name


def test_training_is_that_on_the_rounded_weights_and_resumes_exactly(pipeline_folder, tmp_path, quantization):
    data, base = write_folders(tmp_path / "data", captions=True), pipeline_folder("stable_diffusion_3")
    changes = {"quantization": quantization, "checkpointing_steps": 2, "max_train_steps": 4}
    whole = adapter_weights(train(TrainingArguments(**settings(base, data, tmp_path / "whole", **changes))))
    cut = settings(base, data, tmp_path / "cut", **changes)
    train(TrainingArguments(**cut | {"max_train_steps": 2}))
    resumed = adapter_weights(train(TrainingArguments(**cut | {"resume_from_checkpoint": "latest"})))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    rounded = dequantized(base, quantization, tmp_path / "rounded")
    changes["quantization"] = None
    expected = adapter_weights(train(TrainingArguments(**settings(rounded, data, tmp_path / "expected", **changes))))
    assert_close_to_largest(whole, expected, 1e-3)
    with pytest.raises(ValueError, match="--quantization"):
        train(TrainingArguments(**cut | {"quantization": None, "resume_from_checkpoint": "latest"}))
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"| quantization of the base | {quantization} |" in card


def test_commands_take_it(pipeline_folder, tmp_path, quantization):
    data, base = write_folders(tmp_path / "data", captions=True), pipeline_folder("stable_diffusion_3")
    adapter = train(TrainingArguments(**settings(base, data, tmp_path / "out", quantization=quantization)))
    sampling = ["--num_inference_steps", "1", "--prompt", "a"]
    check_commands(adapter, base, tmp_path, ["--quantization", quantization], sampling)


@pytest.mark.parametrize("changes", [{}, {"dry_run": True}])
def test_it_is_said_once_that_unpacked_weights_are_kept(pipeline_folder, tmp_path, capsys, changes):
    data, base = write_folders(tmp_path / "data", captions=True), pipeline_folder("stable_diffusion_3")

    def said(name, **more):
        train(TrainingArguments(**settings(base, data, tmp_path / name, **changes, **more)))
        return capsys.readouterr().out.count(KEPT_UNPACKED)

    assert said("kept", quantization="int8") == 1
    assert said("checkpointed", quantization="int8", gradient_checkpointing=True) == said("plain") == 0


def test_language_models_take_it(tmp_path, capsys, quantization):
    language_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    given = arguments(
        tmp_path, pretrained_model_name_or_path=str(tmp_path / "base"), quantization=quantization, max_train_steps=2
    )
    folder = train_text(given, data=text_data())
    assert capsys.readouterr().out.count(KEPT_UNPACKED) == 1
    model, _ = StoredAdapter.open(folder).language_model(quantization=quantization)
    save_baked(model, "formal", tmp_path / "baked")
    plain = load_language_model(str(tmp_path / "base"), None, torch.float32)
    assert type(plain.model.layers[0].self_attn.q_proj.weight.data) is torch.Tensor


def test_eight_bits_of_bitsandbytes_are_trained_and_measured_as_their_values(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    for module in ("bases.quantization", "training.arguments"):  # slow on a CPU, but not for so small a model
        monkeypatch.setattr(f"hf_causal_context.{module}.check_quantization", lambda name: None)
    for name in ("base", "rounded"):
        language_model("llama").save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    packed = load_language_model(str(tmp_path / "base"), None, torch.float32, "llm_int8")
    rounded = language_model("llama")
    for module, same in zip(rounded.modules(), packed.modules(), strict=True):
        if isinstance(module, torch.nn.Linear):
            module.weight.data = dequantize_module_weight(same).data.clone()
    rounded.save_pretrained(tmp_path / "rounded")
    assert packed.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    given = {"pretrained_model_name_or_path": str(tmp_path / "base"), "quantization": "llm_int8"}
    folder = train_text(arguments(tmp_path, **given), data=text_data())
    given = {"pretrained_model_name_or_path": str(tmp_path / "rounded")}
    expected = train_text(arguments(tmp_path / "expected", **given), data=text_data())
    assert_close_to_largest(adapter_weights(folder), adapter_weights(expected), 1e-2)  # activations are rounded, too
    small, _ = StoredAdapter.open(folder).language_model(quantization="llm_int8")
    plain, _ = StoredAdapter.open(folder, str(tmp_path / "rounded")).language_model()
    assert torch.allclose(causal_effects(small).changes, causal_effects(plain).changes, rtol=1e-5)
    save_baked(small, "formal", tmp_path / "baked")


@pytest.mark.parametrize("name", ["nf4", "llm_int8"])
def test_a_missing_package_is_named_before_anything_is_loaded(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=f"--quantization={name} needs bitsandbytes: pip install bitsandbytes"):
        TrainingArguments(pretrained_model_name_or_path="x", output_dir=str(tmp_path), quantization=name)


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize(("name", "bits"), [("nf4", "load_in_4bit"), ("llm_int8", "load_in_8bit")])
def test_bitsandbytes_is_asked_for_the_bits_of_the_name(monkeypatch, name, bits, library):
    monkeypatch.setattr("hf_causal_context.bases.quantization.check_quantization", lambda name: None)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.50.2")
    asked = quantization_config(name, library, torch.bfloat16).to_dict()
    assert {key for key in ("load_in_4bit", "load_in_8bit") if asked[key]} == {bits}


@pytest.mark.parametrize("name", ["nf4", "llm_int8"])
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, monkeypatch, name):
    monkeypatch.setattr("hf_causal_context.bases.quantization.find_spec", lambda package: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--quantization={name} needs a GPU. Allowed without one: int8, fp8"):
        TrainingArguments(pretrained_model_name_or_path="x", output_dir=str(tmp_path), quantization=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "int3"}, r"--quantization=int3 is unknown. Allowed: int8, fp8, nf4, llm_int8\.$"),
        (
            {"quantization": "int4"},
            "--quantization=int4 is unknown. Allowed: int8, .* Give nf4 on a GPU, or --gguf_file",
        ),
        ({"quantization": "int8", "shard_base": True}, "Leave one of them out"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(pretrained_model_name_or_path="x", output_dir=str(tmp_path), **changes)
