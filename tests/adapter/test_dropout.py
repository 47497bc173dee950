"""Dropout: what the adapter reads in training, and nothing else."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_causal_context import CausalContextConfig, intervene
from hf_causal_context.adapter.baking import bake
from hf_causal_context.cli import main

from .small import CONCEPTS, MIXED, VARIANTS


class OneLinear(nn.Module):
    """(rows, 64) -> (rows, 8)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.only = nn.Linear(64, 8)

    def forward(self, x):
        return self.only(x)


def adapted(dropout, **options):
    base = OneLinear()
    config = CausalContextConfig(concepts=CONCEPTS, target_modules=["only"], dropout=dropout, **options)
    torch.manual_seed(1)
    return get_peft_model(base, config)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_in_training_the_adapter_reads_what_is_left_and_the_base_everything(options):
    model, without = adapted(0.5, init_weights=False, **options), adapted(0.0, init_weights=False, **options)
    base, x = OneLinear(), torch.randn(4, 64)
    torch.manual_seed(2)
    seen = nn.functional.dropout(x, 0.5)
    with intervene(without, MIXED):
        expected = base(x) + without(seen) - base(seen)
    torch.manual_seed(2)
    with intervene(model, MIXED):
        torch.testing.assert_close(model.train()(x), expected, rtol=1e-5, atol=1e-5)
    with intervene(without, MIXED), torch.no_grad():
        kept = without(x)
    with intervene(model, MIXED), torch.no_grad():
        assert torch.equal(model.eval()(x), kept)


def test_a_fresh_adapter_leaves_the_base_as_it_is_and_what_is_baked_knows_no_dropout():
    x = torch.randn(4, 64)
    model = adapted(0.5).train()
    with intervene(model, MIXED):
        assert torch.equal(model(x), OneLinear()(x))
    config, weights = bake(adapted(0.5, init_weights=False), "thick+slant")
    assert config.lora_dropout == 0
    for name, weight in bake(adapted(0.0, init_weights=False), "thick+slant")[1].items():
        assert torch.equal(weights[name], weight)


def test_shares_that_are_none_are_refused(capsys):
    for share in (1, -0.1, True, "0.5"):
        with pytest.raises(ValueError, match="dropout=.* must be at least 0 and below 1; 0.05 is usual"):
            CausalContextConfig(concepts=CONCEPTS, dropout=share)
    data = ["--train_data_dir", "none", "--output_dir", "none", "--pretrained_model_name_or_path", "none"]
    assert main(["train-text", *data, "--dropout", "1"]) == 1
    assert "--dropout=1.0 must be at least 0 and below 1" in capsys.readouterr().err
