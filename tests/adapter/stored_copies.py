"""What the tests of stored adapters share: copies that they change, and what a refusal must leave behind."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from hf_causal_context import AdapterError, load_context_adapter

from .fixtures.adapters import ADAPTERS


def base_for(name):
    return ADAPTERS[name.split("_", 2)[2]][0]()


def pipeline(unet):
    return DDPMPipeline(unet, DDPMScheduler())


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    return folder


def refused(folder, message):
    """The pipeline refuses an adapter and stays as it was; PEFT does not get a wrong one to work either."""
    pipe = pipeline(ADAPTERS["unet_reduced"][0]())
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    attributes = set(vars(pipe.unet))
    with pytest.raises(AdapterError, match=message) as caught:
        load_context_adapter(pipe, folder)
    assert len(str(caught.value)) < 2_000
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert set(vars(pipe.unet)) == attributes
    assert not pipe.unet._forward_pre_hooks
