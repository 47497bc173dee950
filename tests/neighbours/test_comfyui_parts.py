"""What the nodes for ComfyUI are made of, without ComfyUI."""

import importlib
import json

import pytest
import torch
from torch import nn

from examples.comfyui.adapters import adapters_at_hand, sliders
from examples.comfyui.rows import LoraPerImage
from examples.comfyui.targets import Target, find_key, find_keys, known_targets


def test_the_package_imports_without_comfyui():
    assert callable(importlib.import_module("examples.comfyui").comfy_entrypoint)


def write_config(folder, **fields):
    folder.mkdir(parents=True)
    fields = {"peft_type": "CAUSAL_CONTEXT", "concepts": ["thick", "v1.5"], "observational_rank": 0, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def write_cached(cache, repository, **fields):
    """A repository in the cache of the Hub, which has another revision, too."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("b" * 40)
    write_config(place / "snapshots" / ("a" * 40), **fields)
    return write_config(place / "snapshots" / ("b" * 40), **fields)


def test_adapters_are_those_of_the_folder_and_of_the_cache_of_the_hub(tmp_path):
    mine = write_config(tmp_path / "models" / "mine")
    (tmp_path / "models" / "no adapter").mkdir()
    cached = write_cached(tmp_path / "hub", "user/digits-context")
    write_cached(tmp_path / "hub", "user/lora", peft_type="LORA")
    (tmp_path / "hub" / "models--user--model").mkdir()
    found = adapters_at_hand([tmp_path / "models", tmp_path / "none"], tmp_path / "hub")
    assert found == {"mine": mine, "user/digits-context": cached}


def test_sliders_are_the_concepts_and_the_observational_part_where_there_is_one(tmp_path, caplog):
    assert sliders(write_config(tmp_path / "a")) == {"thick": "thick", "v1\u20245": "v1.5"}
    with_part = write_config(tmp_path / "b", observational_rank=2)
    assert list(sliders(with_part).values()) == ["thick", "v1.5", "observational"]
    assert not caplog.text
    assert sliders(write_config(tmp_path / "c", concepts=["thick", "thick"])) == {}
    assert "Duplicate concepts: 'thick'. Every concept needs a name of its own. Its node has no sliders." in caplog.text


def test_targets_are_the_weights_that_the_model_has():
    def swap(change):
        return change

    keys = {
        "transformer.a.to_q": ("fused.weight", (0, 8, 4)),
        "transformer.norm": ("norm.weight", None, swap),
        "lora_unet_conv": "conv.weight",
        "transformer.gone": "gone.weight",
    }
    weights = {
        "fused.weight": torch.zeros(12, 6),
        "norm.weight": torch.zeros(4, 2),
        "conv.weight": torch.zeros(3, 2, 1, 1),
    }
    assert known_targets(keys, weights) == {
        "transformer.a.to_q": Target("fused.weight", (4, 6), (0, 8, 4)),
        "transformer.norm": Target("norm.weight", (4, 2), None, swap),
        "lora_unet_conv": Target("conv.weight", (3, 2, 1, 1)),
    }


@pytest.mark.parametrize(
    ("component", "path", "key"),
    [
        ("", "down_blocks.0.conv1", "lora_unet_down_blocks_0_conv1"),
        ("", "transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
        ("", "blocks.0.attn1.to_out.0", "diffusion_model.blocks.0.self_attn.o"),
        ("", "blocks.0.attn2.add_k_proj", "diffusion_model.blocks.0.cross_attn.k_img"),
        ("", "condition_embedder.image_embedder.ff.net.2", "diffusion_model.img_emb.proj.3"),
        ("text_encoder", "encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q",
         "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
    ],
)  # fmt: skip
def test_keys_of_modules(component, path, key):
    assert find_key(component, path, {key, "another"}) == key
    assert find_key(component, path, {"another"}) is None
    assert find_key("text_encoder_2", "text_model.a", {"text_encoders.clip_l.transformer.text_model.a"}) is None


def test_another_size_is_another_model():
    lora = torch.zeros(2, 6), torch.zeros(4, 2)
    known = {"transformer.a": Target("a.weight", (4, 6)), "transformer.b": Target("b.weight", (4, 2, 3, 1))}
    assert find_keys({"": {"a": lora, "b": lora}}, known, "mine", "this MODEL") == {
        ("", "a"): "transformer.a",
        ("", "b"): "transformer.b",
    }
    known["transformer.a"] = Target("a.weight", (4, 7))
    with pytest.raises(
        ValueError, match="mine does not fit this MODEL, which lacks 1 of the 2 modules .* size: a. Conn"
    ):
        find_keys({"": {"a": lora, "b": lora}}, known, "mine", "this MODEL")


class Network(nn.Module):
    """A convolution of every frame, then a Linear of every pixel, whose output is of two modules of diffusers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.fused = nn.Linear(4, 6)

    def forward(self, x):
        pixels = self.conv(x.flatten(0, 1))
        return self.fused(pixels.flatten(2).mT.unflatten(0, x.shape[:2]))


class Executor:
    """ComfyUI's around the call of a network."""

    def __init__(self, network, call):
        self.class_obj, self.call = network, call

    def __call__(self, x, *_):
        return self.call(x)


@torch.no_grad()
def test_rows_of_an_image_have_its_lora():
    network, frames, images = Network(), 2, 3
    x = torch.randn(2 * images, frames, 3, 6, 6)  # with prompt and without it
    convolution = [(torch.randn(2, 3, 3, 3), torch.randn(4, 2)) for _ in range(images)]
    linear = [(torch.randn(2, 4), torch.randn(2, 2)) for _ in range(images)]
    swapped = Target("fused.weight", (2, 4), (0, 4, 2), lambda change: change.flip(0))
    wrap = LoraPerImage([(Target("conv.weight", (4, 3, 3, 3)), convolution), (swapped, linear)])
    options = {"cond_or_uncond": [1, 0]}
    found = wrap(Executor(network, network), x, None, None, None, None, options)
    assert not network.conv._forward_hooks
    for row in range(len(x)):
        own = Network()
        own.load_state_dict(network.state_dict())
        a, b = convolution[row % images]
        own.conv.weight += torch.einsum("or,rihw->oihw", b, a)
        a, b = linear[row % images]
        own.fused.weight[4:] += (b @ a).flip(0)
        torch.testing.assert_close(found[row], own(x[row : row + 1])[0])
    with pytest.raises(
        ValueError, match="3 contexts were given for a batch of 2 images. Write one context for all, or "
    ):
        wrap(Executor(network, network), x[:4], None, None, None, None, options)
    with pytest.raises(ValueError, match="conv.weight sees 2 rows for 3 images, which cannot be told apart. Give one"):
        wrap(Executor(network, lambda x: network.conv(x[:2, 0])), x, None, None, None, None, options)
    assert not network.conv._forward_hooks
