"""The adapter on tiny real classes of diffusers and transformers."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from hf_causal_context import CausalContextConfig, Context, intervene
from hf_causal_context.adapter.layer import CausalContextLayer

from ..architectures import ARCHITECTURES

CONCEPTS = ("thick", "slant")
MIXED = [("thick",), (), {"slant": -0.5, "thick": 2.0}]


def build(name, **kwargs):
    kwargs = {"concepts": CONCEPTS, "concept_rank": 2} | kwargs
    return get_peft_model(ARCHITECTURES[name].build(), CausalContextConfig(**kwargs)).eval()


def every_layer(name):
    """Names of all Linear and convolution layers."""
    base = ARCHITECTURES[name].build()
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return [key for key, module in base.named_modules() if isinstance(module, kinds)]


def single(inputs, i):
    """The inputs of one row; Flux's position ids have no batch dimension."""
    return {
        key: single(value, i)
        if isinstance(value, dict)
        else value[i : i + 1]
        if isinstance(value, torch.Tensor) and key not in ("img_ids", "txt_ids")
        else value
        for key, value in inputs.items()
    }


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


@torch.no_grad()
def run(name, model, inputs, **kwargs):
    return ARCHITECTURES[name].output(model(**inputs, **kwargs))


def test_a_fresh_adapter_on_the_default_targets_is_the_base_bit_for_bit(name):
    inputs = ARCHITECTURES[name].inputs(3)
    base = run(name, ARCHITECTURES[name].build(), inputs)
    model = build(name)
    assert any(isinstance(m, CausalContextLayer) for m in model.modules())
    assert torch.equal(run(name, model, inputs, context=MIXED), base)


@pytest.mark.parametrize("mechanism", ["independent", "reduced", "structural"])
def test_mixed_contexts_equal_separate_runs_in_every_layer(name, mechanism):
    inputs = ARCHITECTURES[name].inputs(3)
    model = build(name, mechanism=mechanism, target_modules=every_layer(name), init_weights=False, alpha=0.2)
    together = run(name, model, inputs, context=MIXED)
    apart = torch.cat([run(name, model, single(inputs, i), context=c) for i, c in enumerate(MIXED)])
    scale = apart.abs().max()
    torch.testing.assert_close(together / scale, apart / scale, rtol=1e-4, atol=2e-5)
    assert (together[0] - run(name, model, inputs, context=())[0]).abs().max() > 1e-3 * scale


def test_disabled_after_training_is_the_base_bit_for_bit(name):
    inputs = ARCHITECTURES[name].inputs(2)
    base = run(name, ARCHITECTURES[name].build(), inputs)
    model = build(name).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(2):
        ARCHITECTURES[name].output(model(**inputs, context=["thick", "slant"])).square().mean().backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(run(name, model, inputs, context="thick"), base)
    assert not torch.equal(run(name, model, inputs, context=()), base)  # the observational part
    assert torch.equal(run(name, model, inputs), base)
    with model.disable_adapter():
        assert torch.equal(run(name, model, inputs, context="thick"), base)


def test_save_load_and_merge(name, tmp_path):
    inputs = ARCHITECTURES[name].inputs(2)
    model = build(name, mechanism="reduced", init_weights=False, alpha=0.2)
    expected = run(name, model, inputs, context="thick+slant")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(ARCHITECTURES[name].build(), tmp_path)
    assert torch.equal(run(name, loaded, inputs, context="thick+slant"), expected)
    with intervene(loaded, Context("thick", "slant")):
        merged = loaded.merge_and_unload()
    scale = expected.abs().max()
    torch.testing.assert_close(run(name, merged, inputs) / scale, expected / scale, rtol=1e-4, atol=1e-4)


def test_kin_of_t5_that_pefts_table_lacks_have_its_defaults():
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    model = get_peft_model(encoder, CausalContextConfig(concepts=CONCEPTS))
    assert sorted(model.targeted_module_names) == [f"encoder.block.0.layer.0.SelfAttention.{name}" for name in "qv"]
