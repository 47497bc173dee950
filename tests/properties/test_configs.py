"""Configs of arbitrary fields: a valid one, or an error that says which field is wrong."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_causal_context import CausalContextConfig
from hf_causal_context.layers import MECHANISMS

from .cases import OURS, PEFT, UNPRINTABLE, cases, outcome, plain_values

FIELDS = [field.name for field in dataclasses.fields(CausalContextConfig)]
NAMES = ("thick", "slant", "size")
EDGES = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=4)
MODULES = st.sampled_from([None, "all-linear", ["to_q"], ("to_q", "to_k"), {"to_v"}, "to_[qk]", "(", "(a+)+$", ""])
PLAUSIBLE = {
    "concept_rank": st.integers(-1, 5_000),
    "mechanism": st.sampled_from(MECHANISMS),
    "alpha": st.one_of(st.none(), st.floats(), st.integers(-1, 10)),
    "perfect_interventions": st.booleans(),
    "anchored": st.booleans(),
    "dropout": st.sampled_from([0, 0.0, 0.05, 0.999, 1, -0.1, None, True]),
    "expressive_depth": st.integers(-1, 20),
    "concept_graph": st.one_of(st.none(), EDGES),
    "concept_order": st.one_of(st.none(), st.permutations(NAMES), st.lists(st.sampled_from(NAMES), max_size=4)),
    "target_modules": MODULES,
    "exclude_modules": MODULES,
    "layers_to_transform": st.sampled_from([None, 0, [0, 2], -1, [[0]]]),
    "layers_pattern": st.sampled_from([None, "layers", ["h"], "("]),
    "rank_pattern": st.dictionaries(st.sampled_from(["to_q", "first|second", "("]), st.integers(0, 5_000), max_size=2),
    "modules_to_save": st.sampled_from([None, ["head"], ["a", "b"], "head", [1]]),
    "init_weights": st.booleans(),
    "format_version": st.integers(0, 2),
}


def check_config(given_fields):
    # What a task type may be is PEFT's to say.
    raised_in = (OURS, PEFT) if "task_type" in given_fields else OURS
    result = outcome(CausalContextConfig, raised_in=raised_in, **given_fields)
    if isinstance(result, CausalContextConfig):
        stored = json.loads(json.dumps(result.to_dict()))
        for derived in ("peft_type", "auto_mapping"):
            stored.pop(derived)
        again = CausalContextConfig(**stored)
        assert again.to_dict() == result.to_dict()
        assert again.graph().direct.shape == (len(result.concepts),) * 2
        assert result.rank_at("a.to_q") >= 1
    return result


@cases(400)
@given(st.lists(st.sampled_from(list(PLAUSIBLE)), max_size=4, unique=True), st.data())
def test_plausible_fields_make_a_config_or_an_error(names, data):
    check_config({"concepts": NAMES} | {name: data.draw(PLAUSIBLE[name], label=name) for name in names})


@cases(500)
@given(st.lists(st.sampled_from([*FIELDS, "unknown"]), min_size=1, max_size=3, unique=True), st.data())
def test_any_value_of_any_field_makes_a_config_or_an_error(names, data):
    check_config({"concepts": NAMES} | {name: data.draw(plain_values(), label=name) for name in names})


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "peft_type"])  # which is set, whatever is given
def test_so_do_values_that_python_cannot_print(name):
    for value in UNPRINTABLE.values():
        assert not isinstance(check_config({"concepts": NAMES, name: value}), CausalContextConfig), name
