"""PEFT's own `convert_to_lora` and `save_as_lora` on adapters of this package, in the context that is set."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict
from peft.tuners.lora import conversion
from transformers import GPT2Config, GPT2LMHeadModel

from hf_causal_context import CausalContextConfig, bake, intervene
from hf_causal_context.adapter import lora_conversion

from .fixtures.adapters import llama, unet

IDS = torch.arange(10).view(2, 5) + 3
CONTEXT = {"thick": 1.0, "slant": -0.5}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()


def adapted(build=llama, **options):
    torch.manual_seed(0)
    targets = ["c_attn"] if build is gpt2 else ["q_proj", "v_proj"]
    options = {"concept_rank": 2, "alpha": 3.0, "target_modules": targets, "init_weights": False} | options
    return get_peft_model(build(), CausalContextConfig(concepts=("thick", "slant", "size"), **options)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def on_base(config, weights, build=llama):
    torch.manual_seed(0)
    model = get_peft_model(build(), config).eval()
    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("mechanism", ["independent", "reduced", "structural"])
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_where_the_rank_allows_it_is_the_contexts_own_factors(mechanism, build):
    model = adapted(build, mechanism=mechanism)
    with intervene(model, CONTEXT):
        config, weights = convert_to_lora(model, rank=64)
        expected = logits(model)
    baked = bake(model, CONTEXT)[1]
    assert weights.keys() == baked.keys()
    for name, weight in weights.items():
        rank = min(weight.shape[0], weight.shape[1]) if "lora_A" in name else weight.shape[1]
        same = baked[name][:rank] if "lora_A" in name else baked[name][:, :rank]
        assert torch.equal(weight, same), name
    ranks = {weight.shape[0] for name, weight in weights.items() if "lora_A" in name}
    # Without the concept that is not intervened on, unless the mechanism mixes it in; and the observational part.
    assert ranks == ({8 + 4} if mechanism == "independent" else {8 + 6})
    lora = on_base(config, weights, build)
    torch.testing.assert_close(logits(lora), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(model), atol=1e-3)


@pytest.mark.parametrize("rank", [3, 0.5])
def test_a_lower_rank_is_the_closest_matrix_of_that_rank(rank):
    model = adapted()
    with intervene(model, CONTEXT):
        config, weights = convert_to_lora(model, rank=rank)
        for name, layer in model.named_modules():
            if not hasattr(layer, "active_lora"):
                continue
            left, values, right = torch.linalg.svd(layer.get_delta_weight("default"), full_matrices=False)
            kept = rank if isinstance(rank, int) else len(weights[f"{name}.lora_A.weight"])
            closest = (left[:, :kept] * values[:kept]) @ right[:kept]
            product = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
            torch.testing.assert_close(product, closest, rtol=1e-4, atol=1e-5)
            if rank == 0.5:
                assert (values[:kept] ** 2).sum() >= 0.5 * (values**2).sum() > (values[: kept - 1] ** 2).sum()
    on_base(config, weights)


@pytest.mark.slow
def test_what_is_saved_loads_without_this_package(tmp_path):
    model = adapted()
    with intervene(model, CONTEXT):
        save_as_lora(tmp_path / "lora", model, rank=16)
        torch.save(logits(model), tmp_path / "expected.pt")
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    code = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"folder = {str(tmp_path)!r}\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + '/base'), folder + '/lora')\n"
        "found = model(torch.arange(10).view(2, 5) + 3).logits\n"
        "torch.testing.assert_close(found, torch.load(folder + '/expected.pt'), rtol=1e-5, atol=1e-5)\n"
        "assert 'hf_causal_context' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_a_context_there_is_no_lora():
    model = adapted()
    for rank in (64, 3):
        with pytest.raises(ValueError, match="No context is set for adapter 'default', and without one it changes"):
            convert_to_lora(model, rank=rank)
    with intervene(model, ()):  # the observational one is a context
        ranks = {len(weight) for name, weight in convert_to_lora(model, 64)[1].items() if "lora_A" in name}
    assert ranks == {8}
    model.train()
    with pytest.raises(ValueError, match="No context is set for adapter 'default'"):
        convert_to_lora(model, rank=64)
    with intervene(model, ["thick", "slant"]), pytest.raises(ValueError, match="Only one context can be merged"):
        convert_to_lora(model, rank=64)
    with intervene(model, "thick"), pytest.raises(ValueError, match="no causal context adapter 'other'. It has"):
        convert_to_lora(model, rank=64, adapter_name="other")


def test_a_mechanism_that_is_not_linear_is_refused_and_the_reason_is_said():
    model = adapted(expressive_depth=1)
    refusal = pytest.raises(TypeError, match="do not support LoRA conversion")
    reason = "cannot be converted to LoRA: its mechanism is not linear"
    with intervene(model, "thick"), refusal, pytest.warns(UserWarning, match=reason):
        convert_to_lora(model, rank=64)
    with pytest.warns(UserWarning, match=reason):
        supported = model.supports_lora_conversion()
    assert not supported
    assert adapted().supports_lora_conversion()


def test_a_convolution_is_refused_and_the_reason_is_said():
    model = adapted(unet, target_modules=["to_q", "conv1"])
    refusal = pytest.raises(TypeError, match="do not support LoRA conversion")
    with intervene(model, "thick"), refusal, pytest.warns(UserWarning, match="PEFT converts no convolutions"):
        convert_to_lora(model, rank=64)


def test_of_two_adapters_each_is_converted_alone():
    model = adapted(target_modules=["q_proj"])
    model.add_adapter(
        "other", CausalContextConfig(concepts=("loud",), target_modules=["v_proj"], concept_rank=2, init_weights=False)
    )
    with intervene(model, "loud", adapter_name="other"):
        config, weights = convert_to_lora(model, rank=64, adapter_name="other")
    assert {name.split(".")[-3] for name in weights} == {"v_proj"}
    on_base(config, weights)


def test_a_lora_is_converted_as_before():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    with pytest.warns(UserWarning, match="already a LoRA"):
        _, weights = convert_to_lora(model, rank=2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = (weights[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)


def test_a_peft_that_converts_otherwise_gives_the_same_lora(monkeypatch):
    model = adapted()
    lora_conversion.install()  # again: nothing is wrapped twice
    assert not hasattr(conversion._convert_module_to_lora.of_peft, "of_peft")
    monkeypatch.setattr(conversion, "_convert_module_to_lora", conversion._convert_module_to_lora.of_peft)
    with intervene(model, CONTEXT):
        config, weights = convert_to_lora(model, rank=16)
        torch.testing.assert_close(logits(on_base(config, weights)), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="No context is set for adapter 'default'"):
        convert_to_lora(model, rank=16)
    monkeypatch.delattr(conversion, "_convert_module_to_lora")
    lora_conversion.install()
    assert not hasattr(conversion, "_convert_module_to_lora")


def test_the_conversion_compiles():
    model = adapted()
    with intervene(model, CONTEXT):
        weights = convert_to_lora(model, rank=64, compile_kwargs={"backend": "eager"})[1]
    baked = bake(model, CONTEXT)[1]
    for name, weight in weights.items():
        assert torch.equal(weight, baked[name]), name
