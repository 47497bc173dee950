"""Names that adapters cannot have are refused wherever they come in, before anything is changed."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from hf_causal_context import intervene, load_context_adapter

from .small import MIXED, Mlp, adapted, config, inputs

BAD = [
    ("style.v2", "which dots divide"),
    ("", "which dots divide"),
    ("a/b", "and the name of a folder"),
    ("train", "torch's modules have an attribute of that name"),
    ("text", "PEFT could not tell it from 'causal_context_'"),
    ("second", "could not tell it from a module of the base, which has the weight 'second."),
]
bad_names = pytest.mark.parametrize(("name", "reason"), BAD)
# What PEFT says before it asks us.
known_warnings = pytest.mark.filterwarnings(
    "ignore:Adapter name '(text)?' should not", "ignore:Already found a `peft_con"
)


def assert_as_before(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@known_warnings
@bad_names
@pytest.mark.parametrize("attach", ["get_peft_model", "inject"])
def test_a_first_adapter(name, reason, attach):
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"An adapter cannot be called '{name}': .*{reason}.*another adapter_name"):
        get_peft_model(model, config(), name) if attach == "get_peft_model" else inject_adapter_in_model(
            config(), model, name
        )
    assert_as_before(model, before)


@known_warnings
@bad_names
def test_another_adapter(name, reason):
    model = adapted()
    before, expected = copy.deepcopy(model.state_dict()), model(inputs(), context=MIXED)
    with pytest.raises(ValueError, match=reason):
        model.add_adapter(name, config())
    with pytest.raises(ValueError, match=reason):
        inject_adapter_in_model(config(), model.get_base_model(), name)
    assert_as_before(model, before)
    assert list(model.peft_config) == ["default"]
    with intervene(model, MIXED):
        assert torch.equal(model(inputs()), expected)


@known_warnings
@bad_names
def test_a_stored_adapter(name, reason, tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        PeftModel.from_pretrained(Mlp(), tmp_path, adapter_name=name)


@pytest.fixture
def pipe():
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return StableDiffusionPipeline(vae, None, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False)


def test_an_adapter_of_a_pipeline(pipe, tmp_path):
    before = copy.deepcopy(pipe.unet.state_dict())
    for name, reason in BAD[:-1]:
        with pytest.raises(ValueError, match=reason):
            load_context_adapter(pipe, tmp_path / "is looked at later", name)
    get_peft_model(copy.deepcopy(pipe.unet), config(target_modules=["to_q"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a module of the base, which has the weight 'conv_in.weight'"):
        load_context_adapter(pipe, tmp_path, "conv_in")
    with pytest.raises(ValueError, match="An adapter cannot be called 'style.v2'"):
        pipe.unet.add_adapter(config(target_modules=["to_q"]), "style.v2")
    assert_as_before(pipe.unet, before)
    load_context_adapter(pipe, tmp_path, "style")
    with pytest.raises(ValueError, match="An adapter cannot be called 'to_q'"):
        load_context_adapter(pipe, tmp_path, "to_q")
    assert list(pipe.unet.peft_config) == ["style"]


def test_names_of_all_other_kinds_are_kept(tmp_path):
    model = adapted()
    for name in ("digits", "my_adapter", "style-2", "an adapter", "ü"):
        model.add_adapter(name, config(target_modules=["first"]))
    model.save_pretrained(tmp_path)
    for name in ("digits", "style-2", "an adapter", "ü"):
        again = PeftModel.from_pretrained(Mlp(), tmp_path / name, adapter_name=name)
        model.set_adapter(name)
        assert torch.equal(again(inputs(), context=MIXED), model(inputs(), context=MIXED))
