"""Calibrated strengths: the map itself, where it is applied, and what is refused."""

import json

import pytest
import torch
from peft import PeftModel

from hf_causal_context import CausalContextConfig, Context, intervene
from hf_causal_context.adapter.baking import adapter_config, bake
from hf_causal_context.adapter.calibration import store_calibration, strength_at
from hf_causal_context.inference.export import lora_paths

from .small import CONCEPTS, Mlp, adapted, inputs

KNOTS = {"thick": [[0, 0], [0.5, 0.25], [1, 1], [1.25, 1.5]], "slant": [[0.0, 0.0], [0.2, 0.5], [1.0, 1.0]]}
ALL = {**KNOTS, "size": [[0, 0], [1, 1]]}


def dialled(model, context, **options):
    with torch.no_grad(), intervene(model, context, calibrated=True, **options):
        return model(inputs())


def plain(model, context):
    with torch.no_grad(), intervene(model, context):
        return model(inputs())


def test_the_map_is_linear_between_knots_and_a_step_is_a_step_beyond_them():
    dial = torch.tensor([-2.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.125, 1.25, 2.25])
    assert strength_at(dial, KNOTS["thick"]).tolist() == [-2, 0, 0.125, 0.25, 0.625, 1, 1.25, 1.5, 2.5]


def test_0_and_1_stay_what_they_are_bit_for_bit():
    knots = [[0, 0], *([i / 7, (i / 7) ** 1.7] for i in range(1, 7)), [1, 1]]
    assert strength_at(torch.tensor([0.0, 1.0]), knots).tolist() == [0, 1]
    config = CausalContextConfig(concepts=("a", "b"), calibration={"a": knots})
    assert config.calibrated(Context("a", "b")) == Context("a", "b")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"thick": 0.5}, {"thick": 0.25}),
        ("thick=0.75+slant=0.1+size", {"thick": 0.625, "slant": 0.25, "size": 1}),
        ([{"thick": 0.5}, (), "slant", {"slant": -1.0}], [{"thick": 0.25}, (), "slant", {"slant": -1.0}]),
        (Context("thick", observational=0.5), Context("thick", observational=0.5)),
    ],
)
def test_intervene_maps_names(asked, meant):
    model = adapted(calibration=KNOTS)
    assert torch.equal(dialled(model, asked), plain(model, meant))
    assert not torch.equal(dialled(model, {"thick": 0.5}), plain(model, {"thick": 0.5}))


def test_intervene_maps_masks():
    model = adapted(calibration=ALL)
    asked, meant = torch.tensor([[0.5, 0.1, 0.3]]), torch.tensor([[0.25, 0.25, 0.3]])
    assert torch.equal(dialled(model, asked), plain(model, meant))
    assert torch.equal(dialled(model, asked.expand(4, -1)), plain(model, meant.expand(4, -1)))


def test_each_adapter_has_its_own_dials():
    model = adapted(concepts=("thick",), calibration={"thick": KNOTS["thick"]})
    other = CausalContextConfig(
        concepts=("slant",), init_weights=False, target_modules=["first"], calibration={"slant": KNOTS["slant"]}
    )
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    assert torch.equal(dialled(model, {"thick": 0.5, "slant": 0.1}), plain(model, {"thick": 0.25, "slant": 0.25}))
    named = dialled(model, {"slant": 0.1}, adapter_name="other")
    with torch.no_grad(), intervene(model, {"slant": 0.25}, adapter_name="other"):
        assert torch.equal(named, model(inputs()))


def test_merging_and_baking_have_the_strengths_that_are_meant():
    model = adapted(calibration=KNOTS)
    expected = plain(model, {"thick": 0.25})
    _, weights = bake(model, adapter_config(model).calibrated(Context({"thick": 0.5})))
    _, same = bake(model, {"thick": 0.25})
    assert all(torch.equal(weights[name], same[name]) for name in same)
    with intervene(model, {"thick": 0.5}, calibrated=True):
        model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-6)


def test_exported_files_keep_the_names_of_the_dials(tmp_path):
    config = CausalContextConfig(concepts=CONCEPTS, calibration=KNOTS)
    files = lora_paths(config, ["thick=0.5"], tmp_path, "diffusers", calibrated=True)
    assert files == {tmp_path / "thick=0.5.safetensors": Context({"thick": 0.25})}


def test_it_travels_with_the_adapter_and_old_adapters_have_none(tmp_path):
    model = adapted(calibration={})
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    before = json.loads(path.read_text())
    without = {name: value for name, value in before.items() if name != "calibration"}
    path.write_text(json.dumps(without))
    assert CausalContextConfig.from_pretrained(tmp_path).calibration == {}
    store_calibration(tmp_path, ["", "text_encoder/"], KNOTS)
    assert json.loads(path.read_text()) == {**without, "calibration": KNOTS}
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path).eval()
    assert torch.equal(dialled(loaded, {"thick": 0.5}), plain(model, {"thick": 0.25}))


def test_concepts_without_a_calibration_take_0_and_1_only():
    model = adapted(calibration=KNOTS)
    with pytest.raises(ValueError, match=r"no calibration of 'size'.*evaluate --calibrate"):
        dialled(model, {"size": 0.5})
    with pytest.raises(ValueError, match="no calibration of 'size'"):
        dialled(model, torch.tensor([[0.0, 0.0, 0.5]]))
    assert torch.equal(dialled(model, "size"), plain(model, "size"))
    assert torch.equal(dialled(model, torch.tensor([[0.5, 0.0, 1.0]])), plain(model, "thick=0.25+size"))
    with pytest.raises(ValueError, match="Unknown concept 'color'"):
        dialled(model, {"color": 0.5})


@pytest.mark.parametrize(
    "calibration",
    [
        None,
        [],
        {"color": [[0, 0], [1, 1]]},
        {"thick": None},
        {"thick": "abc"},
        {"thick": [[0, 0]]},
        {"thick": [[0, 0], [0.5, 0.6]]},
        {"thick": [[0, 0], [0.5, 0.7], [0.4, 0.8], [1, 1]]},
        {"thick": [[0, 0], [0.5, 0.7], [0.6, 0.7], [1, 1]]},
        {"thick": [[0, 0.1], [1, 1]]},
        {"thick": [[0, 0], [1, 1], [float("inf"), 2]]},
        {"thick": [[0, 0], [1, 1], [2, 10**400]]},
        {"thick": [[0, 0], ["1", 1]]},
        {"thick": [[0, 0], [1, 1, 1]]},
        {"thick": [[i, i] for i in range(101)]},
    ],
)
def test_what_is_no_calibration_is_refused(calibration):
    with pytest.raises(ValueError, match="calibration"):
        CausalContextConfig(concepts=("thick",), calibration=calibration)


@pytest.mark.parametrize("context", ["thick", "thick=0.5", [(), ("thick",)], torch.tensor([[1.0, 0.0, 0.0]])])
def test_an_adapter_without_any_calibration_has_no_calibrated_strengths(context):
    message = "no calibration of 'thick', so a calibrated strength means nothing. Make one with"
    with pytest.raises(ValueError, match=message):
        dialled(adapted(), context)
    with pytest.raises(ValueError, match=message):
        CausalContextConfig(concepts=CONCEPTS).calibrated(Context("thick"))
