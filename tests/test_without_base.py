"""Contexts of a stored adapter as LoRA without its base: they are what the adapter on its base computes."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_causal_context import CausalContextConfig, Context
from hf_causal_context.adapter.baking import context_strengths
from hf_causal_context.adapter.lookup import adapted_layers
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.without_base import loras_without_base

CONTEXTS = [Context({"thick": 0.5, "slant": 1.0}), Context({"size": -1.0}), Context()]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.wide = nn.Linear(8, 12)
        self.conv = nn.ModuleList([nn.Conv1d(3, 5, 3), nn.Conv2d(4, 2, (3, 1), stride=2), nn.Conv3d(2, 3, 2)])


def stored(folder, **settings):
    settings = {"concepts": ("thick", "slant", "size"), "alpha": 3.0, **settings}
    targets = ["linear", "wide", "conv.0", "conv.1", "conv.2"]
    config = CausalContextConfig(target_modules=targets, concept_rank=2, init_weights=False, **settings)
    network = get_peft_model(Network(), config)
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize(
    "settings",
    [
        {"mechanism": "independent", "observational_rank": 0},
        {"mechanism": "independent", "observational_rank": 3, "rank_pattern": {"wide": 4}},
        {"mechanism": "reduced", "perfect_interventions": False},
        {"mechanism": "reduced", "anchored": True, "concept_order": ("slant", "thick", "size")},
        {"mechanism": "structural", "concept_graph": (("thick", "size"), ("slant", "size"))},
    ],
    ids=["independent", "ranks", "reduced", "anchored", "structural"],
)
def test_loras_are_those_on_the_base(tmp_path, settings):
    network = stored(tmp_path, **settings)
    for component in ("text_encoder", "text_encoder_2"):
        torch.manual_seed(len(component))
        stored(tmp_path / component, **settings)
    loras = loras_without_base(StoredAdapter.open(tmp_path), CONTEXTS)
    assert [set(parts) for parts in loras] == [{"", "text_encoder", "text_encoder_2"}] * 3
    assert not torch.equal(loras[0][""]["linear"][0], loras[0]["text_encoder"]["linear"][0])
    layers = adapted_layers(network.get_base_model())
    for context, parts in zip(CONTEXTS, loras, strict=True):
        strengths = context_strengths(network.peft_config["default"], [context])
        assert parts[""].keys() == layers.keys()
        for path, layer in layers.items():
            for found, expected in zip(parts[""][path], layer.lora_weights("default", strengths), strict=True):
                assert torch.equal(found, expected)


def test_what_is_no_lora_is_refused(tmp_path):
    stored(tmp_path / "deep", expressive_depth=1)
    with pytest.raises(ValueError, match="cannot be baked or merged: its mechanism is not linear"):
        loras_without_base(StoredAdapter.open(tmp_path / "deep"), CONTEXTS)
    stored(tmp_path / "plain")
    with pytest.raises(ValueError, match="Unknown concept 'colour' in context 'colour'. Known concepts"):
        loras_without_base(StoredAdapter.open(tmp_path / "plain"), [Context("colour")])
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["linear"]}))
    with pytest.raises(ValueError, match="plain holds whole modules or tokens .modules_to_save.*, which are no LoRA"):
        loras_without_base(StoredAdapter.open(tmp_path / "plain"), CONTEXTS)


def test_damaged_files_are_refused(tmp_path):
    stored(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if "linear.causal_context_up" not in name}, file)
    with pytest.raises(ValueError, match="is not whole: it lacks 1 weights that its config asks for, such as"):
        loras_without_base(StoredAdapter.open(tmp_path), CONTEXTS)
