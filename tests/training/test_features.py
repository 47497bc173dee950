"""What a frozen denoiser sees in images, for every family of bases."""

import contextlib

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from hf_causal_context import CausalContextConfig
from hf_causal_context.bases.loading import load_base
from hf_causal_context.training.denoiser.features import (
    _SeenEnough,
    _watched_blocks,
    denoiser_features,
    principal_components,
)

from .tiny_pipelines import EVERY


def images(count, base, size):
    generator = np.random.default_rng(0)
    shape = (count, size, size, base.image_channels)
    squeezed = generator.integers(0, 256, shape, dtype=np.uint8).squeeze(-1 if base.image_channels == 1 else ())
    return [Image.fromarray(pixels) for pixels in squeezed]


@pytest.mark.parametrize("name", EVERY)
def test_every_family_gives_features_that_tell_images_apart(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    size = base.default_resolution
    shown = images(6, base, size)
    config = CausalContextConfig(concepts=("a", "b"), mechanism="reduced", init_weights=False)
    model = get_peft_model(base.denoiser, config).train()
    seen = denoiser_features(base, [*shown, shown[0]], size)
    assert seen.shape[0] == 7
    assert torch.isfinite(seen).all()
    assert seen.equal(denoiser_features(load_base(pipeline_folder(name)), [*shown, shown[0]], size))  # of the bare base
    distances = torch.cdist(seen, seen)
    assert distances[0, 6] < 1e-2 * distances[0, 1:6].min()
    # nothing is left behind: the model trains on, and computes all of itself
    assert model.training
    assert not any(
        block._forward_hooks for block in base.denoiser.modules() if type(block).__name__.endswith(("Block", "Block2D"))
    )


def test_a_base_that_overflows_is_refused(pipeline_folder):
    base = load_base(pipeline_folder("ddpm"))
    get_peft_model(base.denoiser, CausalContextConfig(concepts=("a",)))
    size = base.default_resolution
    with torch.no_grad():
        base.denoiser.get_parameter("conv_in.weight").mul_(torch.inf)
    with pytest.raises(ValueError, match=r"sees in 3 of 3 samples is not finite.*--mixed_precision bf16 or no"):
        denoiser_features(base, images(3, base, size), size)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "aura_flow", "cogview4", "hunyuan_image"])
def test_of_joint_blocks_the_tokens_of_the_image_are_seen(name, pipeline_folder):
    base = load_base(pipeline_folder(name))
    model = get_peft_model(base.denoiser, CausalContextConfig(concepts=("a",)))
    latents = base.encode_images(torch.rand(1, 3, 32, 32))
    patches = latents[0, 0].numel() // (1 if name == "hunyuan_image" else 4)
    with torch.no_grad(), _watched_blocks(base) as seen, contextlib.suppress(_SeenEnough):
        base.predict(model, latents, torch.tensor([20.0]), base.encode_captions([""]), torch.zeros(1, 1))
    assert {tokens.shape[1] for tokens in seen.values()} == {patches}


def test_principal_components_keep_the_largest_directions_half_whitened():
    directions = torch.linalg.qr(torch.randn(20, 20)).Q[:3]
    values = torch.randn(500, 3) * torch.tensor([9.0, 4.0, 1.0]) @ directions + 0.001 * torch.randn(500, 20)
    components = principal_components(values)
    assert components.shape == (500, 20)
    deviations = components.std(0)
    assert (deviations[:3] > 10 * deviations[3:].max()).all()
    assert components.equal(principal_components(values))
