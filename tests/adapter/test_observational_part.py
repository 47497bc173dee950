"""The observational part: on in every context, with a strength of its own, and off without a context."""

import copy
import re

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from hf_causal_context import CausalContextConfig, Context, causal_effects, intervene
from hf_causal_context.adapter.lookup import adapted_layers

from .fixtures.adapters import FOLDER
from .small import CONCEPTS, MIXED, VARIANTS, Mlp, adapted, inputs

ANCHORED = ("independent", "reduced, anchored", "structural, anchored, ordered")


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def without_part(model):
    """The same adapter with its observational part cut off."""
    cut = copy.deepcopy(model)
    for layer in adapted_layers(cut).values():
        part = layer.causal("default").observational_rank
        layer.causal("default").observational_rank = 0
        layer.conditioning.observational_ranks["default"] = 0
        down, up = layer.causal_context_down["default"], layer.causal_context_up["default"]
        down.weight = nn.Parameter(down.weight[part:].detach().clone())
        up.weight = nn.Parameter(up.weight[:, part:].detach().clone())
    return cut


def test_it_is_an_adapter_of_its_own_that_is_on_in_every_context(variant):
    model, x = adapted(**VARIANTS[variant], observational_rank=3, target_modules=["second"]), inputs()
    second = model.get_base_model().second
    down, up = (getattr(second, f"causal_context_{name}")["default"].weight.detach() for name in ("down", "up"))
    hidden = torch.tanh(model.get_base_model().first(x))
    part = hidden @ down[:3].T @ up[:, :3].T
    plain = without_part(model)
    for context in ((), "thick", MIXED):
        torch.testing.assert_close(model(x, context=context), plain(x, context=context) + part, rtol=1e-4, atol=1e-5)


def test_its_strength_scales_it(variant):
    model, x = adapted(**VARIANTS[variant], target_modules=["second"]), inputs()
    off = without_part(model)
    for context in ((), "thick", MIXED):
        with intervene(off, context):
            nothing = off(x)
        with intervene(model, context):
            whole = model(x) - nothing
        for strength in (0, 0.5, -2.0):
            with intervene(model, context, observational=strength):
                torch.testing.assert_close(model(x) - nothing, strength * whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ANCHORED)
def test_at_zero_the_empty_context_is_the_base(variant):
    model, x = adapted(**VARIANTS[variant]), inputs()
    assert not torch.equal(model(x, context=()), Mlp()(x))
    torch.testing.assert_close(model(x, context=Context(observational=0)), Mlp()(x), rtol=0, atol=0)


def test_the_strength_is_part_of_a_context_in_every_form():
    model, x = adapted(), inputs()
    with intervene(model, "thick", observational=0.5):
        expected = model(x)
    for context in (
        "thick+observational=0.5",
        "observational=0.5,thick",
        {"thick": 1, "observational": 0.5},
        Context("thick", observational=0.5),
        Context("thick") | Context(observational=0.5),
    ):
        assert torch.equal(model(x, context=context), expected)
    mixed = model(x, context=["thick", Context("thick", observational=0.5), (), "observational=0.5"])
    torch.testing.assert_close(mixed[1], expected[1])
    torch.testing.assert_close(mixed[0], model(x, context="thick")[0])
    mask = torch.tensor([[1.0, 0, 0]])
    with intervene(model, mask, observational=0.5):
        assert torch.equal(model(x), expected)


def test_a_strength_that_cannot_be():
    with pytest.raises(ValueError, match=r"'default' has none \(observational_rank=0\)\. Leave it out"):
        intervene(adapted(observational_rank=0), "thick", observational=0)
    with pytest.raises(ValueError, match=r"'default' has none \(observational_rank=0\)"):
        intervene(adapted(observational_rank=0), ["thick", "observational=0.3"])
    intervene(adapted(observational_rank=0), "thick", observational=1)  # what it is anyway
    model = adapted()
    with pytest.raises(ValueError, match="'observational' has two strengths in one context: 0 and 0.5"):
        intervene(model, "observational=0", observational=0.5)
    for strength in (float("nan"), "much"):
        with pytest.raises(ValueError, match="of concept 'observational' must be a finite number"):
            intervene(model, torch.zeros(1, 3), observational=strength)


def test_without_a_context_all_adapters_are_off_and_an_adapter_that_is_passed_over_too():
    model, x = adapted(concepts=("a",)), inputs()
    model.add_adapter("other", CausalContextConfig(concepts=("b",), target_modules=["first"], init_weights=False))
    model.set_adapter("other")
    only_other = [model(x, context="b"), model(x, context=())]
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    assert torch.equal(model(x), Mlp()(x))
    assert torch.equal(model(x, context="b"), only_other[0])
    assert not torch.equal(model(x, context=()), only_other[1])  # the observational world of both


def test_merged_at_its_strength_and_taken_out_again():
    model, x = adapted(), inputs()
    context = Context({"slant": -0.5}, observational=0.3)
    expected = model(x, context=context)
    with intervene(model, context):
        model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    with intervene(model, context):
        torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match=re.escape("merged for the context 'observational=0.30000001")):
        model(x, context={"slant": -0.5})
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), Mlp()(x))


def test_it_is_trained_in_the_empty_context_and_concepts_are_not():
    model = get_peft_model(Mlp(), CausalContextConfig(concepts=CONCEPTS, target_modules=["second"])).train()
    layer = model.get_base_model().second
    model(inputs(), context=()).square().mean().backward()
    gradient = layer.causal_context_up["default"].weight.grad
    assert (gradient[:, :16] != 0).any()
    assert (gradient[:, 16:] == 0).all()


def test_the_read_out_is_of_the_concepts_alone():
    model = adapted()
    a, b = causal_effects(model), causal_effects(without_part(model))
    for name in ("observational", "interventional", "changes"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))


def test_it_is_on_by_default_and_off_in_stored_adapters_that_do_not_name_it(tmp_path):
    assert CausalContextConfig(concepts=("a",)).observational_rank == 16
    assert CausalContextConfig(concepts=("a",), concept_rank=2).observational_rank == 8
    folder = FOLDER / "format_1_llama_independent"
    assert CausalContextConfig.from_pretrained(folder).observational_rank == 0
    assert PeftConfig.from_pretrained(folder).observational_rank == 0
    model = adapted(observational_rank=5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert loaded.peft_config["default"].observational_rank == 5
    assert torch.equal(loaded(inputs(), context=MIXED), model(inputs(), context=MIXED))


@pytest.mark.parametrize("rank", [-1, 1.5, "four", True, 10**6])
def test_a_rank_that_cannot_be(rank):
    with pytest.raises(ValueError, match="observational_rank"):
        CausalContextConfig(concepts=("a",), observational_rank=rank)


def test_its_name_is_no_concept():
    with pytest.raises(ValueError, match="'observational' cannot be the name of a concept.*Rename the concept"):
        CausalContextConfig(concepts=("thick", "observational"))
