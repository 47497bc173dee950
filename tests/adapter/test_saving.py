"""`save_pretrained` of models that carry adapters: the base under its own names, and the adapter beside it."""

from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from transformers import GPT2LMHeadModel

from ..architectures import ARCHITECTURES
from .small import config, gpt2


@pytest.fixture
def model():
    return inject_adapter_in_model(config(target_modules=["c_attn"]), gpt2(), "default")


@pytest.mark.filterwarnings("ignore:.*was saved without")
@pytest.mark.parametrize("of_base", [False, True])
def test_a_state_dict_that_was_gathered_elsewhere_is_saved_under_the_names_of_the_base(model, tmp_path, of_base):
    state = gpt2().state_dict() if of_base else model.state_dict()
    names = list(state)
    model.save_pretrained(tmp_path, state_dict=state)
    again, base = GPT2LMHeadModel.from_pretrained(tmp_path).state_dict(), gpt2().state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in base.items())
    assert list(state) == names


@pytest.mark.filterwarnings("ignore:.*was saved without")
def test_the_main_process_alone_writes_the_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "default").exists()
    model.save_pretrained(tmp_path / "main", is_main_process=True)
    assert (tmp_path / "main" / "default" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("build", [gpt2, ARCHITECTURES["unet2d_condition"].build])
def test_an_upload_that_would_leave_out_the_adapter_is_refused(build, tmp_path):
    model: Any = inject_adapter_in_model(config(target_modules="all-linear"), build(), "default")
    with pytest.raises(ValueError, match="would upload the base alone"):
        model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="user/name")
    assert not (tmp_path / "folder").exists()
