"""Costs from shapes: what is computed on the meta device is what a real step has."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmarks import costs
from hf_causal_context import CausalContextConfig
from hf_causal_context.training.dry_run import readable, total_bytes

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
SETTINGS = {**SHAPE, "num_hidden_layers": 3, "vocab_size": 128}


@pytest.fixture
def real(monkeypatch):
    """The same base with its adapter, and the bytes that autograd keeps in a real forward pass in bfloat16."""
    monkeypatch.setattr(costs, "TOKENS", 64)
    base = LlamaForCausalLM(LlamaConfig(use_cache=False, **SETTINGS)).to(torch.bfloat16)
    size = total_bytes([*base.parameters(), *base.buffers()])
    config = CausalContextConfig(concepts=costs.CONCEPTS, concept_rank=4, observational_rank=4)
    model = get_peft_model(base, config).to(torch.bfloat16).train()
    kept = costs.Kept(model, costs.repeated_blocks(base))
    ids = torch.zeros(1, costs.TOKENS, dtype=torch.long)
    mask = torch.zeros(1, 1, costs.TOKENS, costs.TOKENS, dtype=torch.bfloat16)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor)
    with costs.flash_attention(), hooks:
        model(input_ids=ids, attention_mask=mask, context=[("a",)])
    return size, sum(p.numel() for p in model.parameters() if p.requires_grad), kept


def test_memory_and_arithmetic_are_those_of_a_real_step(real):
    row = costs.costs(costs.llama(**SETTINGS))
    size, adapter, kept = real
    assert row["base"] == readable(size)
    assert row["adapter"] == f"{adapter / 1e6:.1f} M"
    assert row["it, its gradients and AdamW"] == readable(16 * adapter)
    assert row["kept"] == readable(kept.all)
    assert row["kept, checkpointed"] == readable(kept.checkpointed)
    assert kept.checkpointed < kept.all
    # Two operations for each weight and token, in the forward pass and again for the gradient of the input.
    weights = 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 256) + 64 * 128
    attention = 3 * 4 * 64 * 64 * 64 * 3.5
    assert float(row["TFLOP"]) * 1e12 == pytest.approx(2 * 2 * weights * 64 + attention, rel=0.15)
