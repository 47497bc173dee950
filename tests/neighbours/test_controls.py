"""What else steers a pipeline, in both orders: ControlNet, IP-Adapter, textual inversion."""

import copy
from functools import partial

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import nn

from hf_causal_context import intervene, load_context_adapter
from hf_causal_context.bases.families.stable_diffusion import StableDiffusion

from .. import test_pipelines
from ..test_pipelines import CLOSE, CONTEXTS, build, write_adapter
from .test_style_loras import merged

NAME = "stable_diffusion"
# A pipeline with a ControlNet is no base, but what it does is.
run = partial(test_pipelines.run, family=StableDiffusion)
ORDERS = pytest.mark.parametrize("order", ["adapter first", "adapter last"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plain pipeline and an adapter."""
    plain = build(NAME)
    return plain, write_adapter(plain.unet, tmp_path_factory.mktemp("adapter"))


def check(plain, folder, order, steer, **arguments):
    """With a context, a steered pipeline does what it does with the merged weights; without, what it did."""
    pipe = copy.deepcopy(plain)
    pipe = steer(load_context_adapter(pipe, folder)) if order == "adapter first" else steer(pipe)
    if order == "adapter last":
        load_context_adapter(pipe, folder)
    steered = run(NAME, steer(copy.deepcopy(plain)), **arguments)
    assert (steered - run(NAME, plain)).abs().max() > 1e-3
    assert torch.equal(run(NAME, pipe, **arguments), steered)
    apart = []
    for row, context in enumerate(CONTEXTS):
        expected = run(NAME, steer(merged(plain, pipe, context)), **arguments)
        with intervene(pipe, context):
            torch.testing.assert_close(run(NAME, pipe, **arguments), expected, **CLOSE)
        apart.append(expected[row])
    with intervene(pipe, CONTEXTS):
        torch.testing.assert_close(run(NAME, pipe, **arguments), torch.stack(apart), **CLOSE)


@ORDERS
def test_controlnet(made, order):
    plain, folder = made
    torch.manual_seed(3)
    controlnet = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(8, 8))
    for module in (controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        for weight in module.parameters():  # they begin at zero
            nn.init.normal_(weight, std=0.5)

    def steer(pipe):
        steered = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
        steered.set_progress_bar_config(disable=True)
        return steered

    check(plain, folder, order, steer, image=torch.rand(2, 3, 16, 16))


@ORDERS
def test_ip_adapter(made, order):
    plain, folder = made
    torch.manual_seed(3)
    weights = {"image_proj": {}, "ip_adapter": {}}
    for name, shape in {"proj.weight": (64, 8), "proj.bias": (64,), "norm.weight": (16,), "norm.bias": (16,)}.items():
        weights["image_proj"][name] = torch.randn(shape)
    for number, name in enumerate(name for name in plain.unet.attn_processors if "attn2" in name):
        del name
        for part in ("to_k_ip", "to_v_ip"):
            weights["ip_adapter"][f"{2 * number + 1}.{part}.weight"] = torch.randn(16, 16)

    def steer(pipe):
        pipe.unet._load_ip_adapter_weights([weights])
        return pipe

    embeddings = torch.randn(4, 1, 8)  # negative and positive, of two prompts
    check(plain, folder, order, steer, ip_adapter_image_embeds=[embeddings])


@ORDERS
def test_textual_inversion(made, order):
    plain, folder = made

    def steer(pipe):
        pipe.load_textual_inversion({"c": 5 * torch.ones(1, 16)}, token="cat")
        return pipe

    check(plain, folder, order, steer)
