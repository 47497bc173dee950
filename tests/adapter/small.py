"""Small models and adapters that several test files use."""

import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_causal_context import CausalContextConfig

CONCEPTS = ("thick", "slant", "size")
MIXED = [("thick",), (), {"slant": -0.5, "size": 2.0}, "thick+slant"]
VARIANTS = {
    "independent": {},
    "reduced": {"mechanism": "reduced"},
    "reduced, imperfect": {"mechanism": "reduced", "perfect_interventions": False},
    "reduced, anchored": {"mechanism": "reduced", "anchored": True},
    "structural": {"mechanism": "structural"},
    "structural, anchored, ordered": {"mechanism": "structural", "anchored": True, "concept_order": CONCEPTS},
    "reduced, expressive": {"mechanism": "reduced", "expressive_depth": 2},
}


class Mlp(nn.Module):
    """(rows, 10) -> (rows, 4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(10, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def gpt2(**kwargs):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, **kwargs)
    return GPT2LMHeadModel(config).eval()


def config(concepts=CONCEPTS, **kwargs):
    return CausalContextConfig(**({"concepts": concepts, "init_weights": False, "observational_rank": 4} | kwargs))


def adapted(model=None, **kwargs):
    """A model with an adapter of random weights, in eval mode."""
    model = Mlp() if model is None else model
    if isinstance(model, Mlp):
        kwargs.setdefault("target_modules", ["first", "second"])
    return get_peft_model(model, config(**kwargs)).eval()


def inputs(rows=4):
    return torch.randn(rows, 10, generator=torch.Generator().manual_seed(1))
