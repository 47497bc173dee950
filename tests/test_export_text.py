"""A language model's contexts as LoRA, read as the tools read them that serve language models."""

import json

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, LlamaForCausalLM

from hf_causal_context import CausalContextConfig, Context, intervene
from hf_causal_context.cli import main
from hf_causal_context.inference.language_export import export_text_contexts

from .training.gguf_files import write, write_llama
from .training.small_language import language_model, word_tokenizer

IDS = torch.tensor([[1, 5, 6, 7, 8]])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def adapted(name="llama", **options):
    given = {"concepts": ("formal", "loud"), "task_type": "CAUSAL_LM", "init_weights": False, "target_modules": TARGETS}
    model = language_model(name)
    torch.manual_seed(1)
    return get_peft_model(model, CausalContextConfig(**given | {"mechanism": "reduced"} | options)).eval()


@pytest.fixture
def export(tmp_path, capsys):
    """Stores a model with its adapter, runs the command, and returns its status and what it printed."""

    def run(model, file_format, *contexts):
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        language_model(model.config.model_type.replace("gemma3_text", "gemma3")).save_pretrained(base)
        word_tokenizer().save_pretrained(base)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(adapter)
        options = ["--format", file_format, "--output_dir", str(tmp_path / "out")]
        status = main(["export", "--adapter", str(adapter), "--contexts", *contexts, *options])
        return status, capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_folders_are_what_vllm_and_sglang_ask_for(export, tmp_path, name):
    model = adapted(name)
    status, printed = export(model, "peft", "formal+loud", "obs")
    assert status == 0, printed.err
    assert printed.out.split() == [str(tmp_path / "out" / each) for each in ("formal+loud", "obs")]
    folder = tmp_path / "out" / "formal+loud"
    config = json.loads((folder / "adapter_config.json").read_text())
    # What vLLM's and SGLang's readers look at.
    assert (config["peft_type"], config["bias"], config["modules_to_save"]) == ("LORA", "none", None)
    assert not any(config.get(name) for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"))
    assert isinstance(config["r"], int)
    assert config["lora_alpha"] == config["r"], "factor 1, divided by either of them"
    modules = dict(language_model(name).named_modules())
    assert isinstance(config["target_modules"], list)
    assert {path.rpartition(".")[2] for path in config["target_modules"]} == set(TARGETS)
    assert all(isinstance(modules[path], nn.Linear) for path in config["target_modules"])
    weights = load_file(folder / "adapter_model.safetensors")
    for path in config["target_modules"]:
        a, b = (weights.pop(f"base_model.model.{path}.lora_{part}.weight") for part in "AB")
        assert a.shape == (config["r"], modules[path].in_features)
        assert b.shape == (modules[path].out_features, config["r"])
    assert not weights
    plain = PeftModel.from_pretrained(language_model(name), str(folder)).eval()
    with torch.no_grad(), intervene(model, "formal+loud"):
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def read_as_weights(folder, changes):
    """A file of a llama with these weights, as transformers reads it."""
    base = language_model("llama")
    path = write_llama(folder / "changes.gguf", base)
    kept = {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type).tolist())
        for tensor in GGUFReader(path).tensors
    }
    write(path, "llama", kept | changes, {"attention.head_count": 4, "attention.head_count_kv": 2}, quantized=False)
    options = {"gguf_file": str(path), "config": base.config, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, **options).state_dict()


def test_a_gguf_file_adds_to_a_weight_what_the_context_does(export, tmp_path):
    model = adapted()
    status, printed = export(model, "gguf", "formal+loud")
    assert status == 0, printed.err
    assert printed.out.strip() == str(tmp_path / "out" / "formal+loud.gguf")
    reader = GGUFReader(tmp_path / "out" / "formal+loud.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    factors = {tensor.name: torch.tensor(tensor.data.tolist()) for tensor in reader.tensors}
    rank = factors["blk.0.attn_q.weight.lora_a"].shape[0]
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(rank),
    }
    # llama.cpp adds alpha / rank x B A to the weight of the name, and transformers reads such weights.
    changes = {
        name.removesuffix(".lora_a"): factors[name.replace(".lora_a", ".lora_b")] @ a
        for name, a in factors.items()
        if name.endswith(".lora_a")
    }
    read = read_as_weights(tmp_path, changes)
    with intervene(model, "formal+loud"):
        expected = {
            f"{path}.weight": layer.get_delta_weight("default")
            for path, layer in model.get_base_model().named_modules()
            if hasattr(layer, "causal_context_down")
        }
    assert len(expected) == len(changes) == 12
    for name, change in expected.items():
        torch.testing.assert_close(read[name], change, rtol=1e-4, atol=1e-6)


def test_an_output_layer_has_a_place_unless_it_is_the_embedding(tmp_path):
    config = language_model("llama").config
    for tied in (False, True):
        config.tie_word_embeddings = tied
        options = {"concepts": ("formal", "loud"), "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "lm_head"]}
        model = get_peft_model(LlamaForCausalLM(config), CausalContextConfig(**options))
        path = tmp_path / f"{tied}.gguf"
        if tied:
            with pytest.raises(ValueError, match="'lm_head' has no place in a LoRA of llama.cpp for a llama"):
                export_text_contexts(model, {path: Context("formal")}, "gguf")
            assert not path.exists()
        else:
            export_text_contexts(model, {path: Context("formal")}, "gguf")
            assert "output.weight.lora_b" in {tensor.name for tensor in GGUFReader(path).tensors}


def test_what_has_no_place_in_a_gguf_file_is_refused(export):
    status, printed = export(adapted("gemma3"), "gguf", "formal")
    assert status == 1
    assert "The base is a gemma3_text, whose weights llama.cpp may keep in another order" in printed.err
    status, printed = export(adapted(), "diffusers", "formal")
    assert "--format diffusers is for pipelines of diffusers, and the adapter is of a language model" in printed.err
