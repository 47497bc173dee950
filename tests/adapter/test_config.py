"""What a user may write, and what is read back."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftType

from hf_causal_context import CausalContextConfig


def test_round_trip_through_a_file(tmp_path):
    config = CausalContextConfig(
        concepts=["b", "a"],
        mechanism="structural",
        concept_graph=[["a", "b"]],
        target_modules=["y", "x"],
        rank_pattern={"x": 2},
        anchored=True,
    )
    config.save_pretrained(tmp_path)
    for cls in (CausalContextConfig, PeftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded == config
        assert isinstance(loaded, CausalContextConfig)
        assert loaded.concepts == ("b", "a")
        assert loaded.peft_type is PeftType.CAUSAL_CONTEXT
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["x", "y"]  # sorted: the same config gives the same file
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_accents_that_were_stored_apart_from_their_letters_are_the_same_names():
    apart, whole = "e\u0301", "\u00e9"
    knots = {apart: [[0.0, 0.0], [1.0, 1.0]]}
    config = CausalContextConfig(
        concepts=(apart, "b"), mechanism="structural", concept_order=("b", apart), calibration=knots
    )
    assert (config.concepts, config.concept_order) == ((whole, "b"), ("b", whole))
    assert config.knots()[whole] == knots[apart]
    edges = CausalContextConfig(concepts=(apart, "b"), mechanism="structural", concept_graph=((apart, "b"),))
    assert edges.concept_graph == ((whole, "b"),)


def test_a_graph_is_shared_by_layers_and_lies_on_the_cpu():
    options = {"concepts": ("first", "second"), "mechanism": "reduced"}
    for order in (("second", "first"), None):
        with torch.device("meta"):
            graph = CausalContextConfig(**options, concept_order=order).graph()
        assert CausalContextConfig(**options, concept_order=order).graph() is graph
        assert {graph.direct.device.type, graph.total.device.type} == {"cpu"}


def test_the_type_is_a_full_member_of_the_enum():
    member = PeftType("CAUSAL_CONTEXT")
    assert member is PeftType.CAUSAL_CONTEXT is PeftType["CAUSAL_CONTEXT"] is pickle.loads(pickle.dumps(member))
    assert member in list(PeftType)
    assert member.value == "CAUSAL_CONTEXT"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"concepts": ()}, ValueError, "No concepts given"),
        ({"concepts": ("a", "a")}, ValueError, "Duplicate concepts: 'a'"),
        ({"concepts": ("a", 1)}, TypeError, "of type int"),
        ({"concepts": ("a+b",)}, ValueError, "must not contain"),
        ({"concept_rank": 0}, ValueError, "concept_rank=0 must be a whole number of at least 1"),
        ({"concept_rank": 2.5}, ValueError, "concept_rank=2.5"),
        ({"expressive_depth": -1}, ValueError, "expressive_depth=-1"),
        ({"rank_pattern": {"x": 0}}, ValueError, r"rank_pattern\['x'\]=0"),
        ({"mechanism": "total"}, ValueError, "Unknown mechanism 'total'. Allowed: 'independent', 'reduced'"),
        ({"alpha": 0}, ValueError, "alpha=0 must be a positive number"),
        ({"concept_order": ("a", "b")}, ValueError, "does not mix concepts, so it takes no concept_graph"),
        ({"mechanism": "reduced", "concept_graph": [("a", "b"), ("b", "a")]}, ValueError, "has a cycle"),
        ({"mechanism": "reduced", "concept_order": ("a",)}, ValueError, "must name every concept once"),
        ({"target_modules": "x", "layers_to_transform": 1}, ValueError, "cannot be used when target_modules is a str"),
        ({"layers_pattern": "h"}, ValueError, "layers_to_transform` must also be specified"),
        ({"task_type": "NOTHING"}, ValueError, "Invalid task type"),
        ({"lora_alpha": 8}, TypeError, r"Unknown fields \['lora_alpha'\] .* Allowed: .*concepts"),
        ({"format_version": 2}, ValueError, "format version 2; the installed hf_causal_context reads up to 1. Upgrade"),
        ({"format_version": "1"}, ValueError, "format_version='1' must be a whole number"),
    ],
)
def test_errors(kwargs, error, message):
    with pytest.raises(error, match=message):
        CausalContextConfig(**({"concepts": ("a", "b")} | kwargs))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"surprise": 1}, TypeError, r"Unknown fields \['surprise'\]"),
        ({"lora_dropout": 0.1}, TypeError, "LoRA's lora_dropout: it is dropout"),
        (
            {"target_parameters": ["a"], "surprise": 1},
            TypeError,
            "LoRA's target_parameters: experts see tokens of several rows",
        ),
        ({"format_version": 7, "surprise": 1}, ValueError, "This adapter has format version 7"),
    ],
)
@pytest.mark.parametrize("cls", [CausalContextConfig, PeftConfig])
def test_a_stored_config_is_never_read_in_part(tmp_path, cls, change, error, message):
    CausalContextConfig(concepts=("a",)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        cls.from_pretrained(tmp_path)


def test_a_concept_called_like_the_empty_context_is_for_stored_adapters_only(tmp_path):
    with pytest.raises(ValueError, match="A concept 'obs' would be hidden by the empty context, which has this name"):
        CausalContextConfig(concepts=("obs", "thick"))
    config = CausalContextConfig(concepts=("plain", "thick"), target_modules=["first"])
    config.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"plain"', '"obs"'))
    assert CausalContextConfig.from_pretrained(str(tmp_path)).concepts == ("obs", "thick")
