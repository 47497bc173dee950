"""Contexts per region in stock pipelines: guidance, several images per prompt, packed latents, text encoders."""

import pytest
import torch
from torch import nn

from hf_causal_context import intervene, load_context_adapter

from .test_pipelines import CLOSE, build, denoiser, run, write_adapter

# Each family's last layer, which sees the image token by token, and the tokens of its latents.
LAST = {
    "stable_diffusion": ("conv_out", 8),
    "stable_diffusion_xl": ("conv_out", 8),
    "stable_diffusion_3": ("proj_out", 8),
    "pixart_sigma": ("proj_out", 8),
    "dit": ("proj_out_2", 8),
    "flux": ("proj_out", 4),
    "qwen_image": ("proj_out", 4),
}
LEFT = torch.zeros(16, 16)
LEFT[:, :8] = 1
MASKS = {"left": LEFT, "right": 1 - LEFT}
CONTEXTS = {"left": "thick", "right": {"slant": -0.5, "size": 2.0}}


def load(name, folder, **kwargs):
    pipe = build(name)
    return load_context_adapter(pipe, write_adapter(denoiser(pipe), folder, **kwargs))


def draw(name, pipe, context, **options):
    images = 1 if name == "dit" else 2
    with intervene(pipe, context, **options):
        return run(name, pipe, images=images)


@pytest.mark.parametrize("name", LAST)
def test_the_same_context_everywhere_is_one_context(name, tmp_path):
    pipe = load(name, tmp_path / "adapter")
    one = draw(name, pipe, "thick")
    everywhere = draw(name, pipe, dict.fromkeys(("left", "right", "else"), "thick"), masks=MASKS)
    torch.testing.assert_close(everywhere, one, **CLOSE)
    two = draw(name, pipe, CONTEXTS, masks=MASKS)
    for context in ("thick", CONTEXTS["right"], ()):
        assert (two - draw(name, pipe, context)).abs().max() > 1e-3


@pytest.mark.parametrize("name", LAST)
def test_each_region_of_a_prediction_is_a_run_of_its_own(name, tmp_path):
    last, tokens = LAST[name]
    pipe = load(name, tmp_path / "adapter", target_modules=[last])
    predictions = []
    handle = denoiser(pipe).register_forward_hook(lambda model, args, output: predictions.append(output[0]))

    def first(context, **options):
        predictions.clear()
        draw(name, pipe, context, **options)
        return predictions[0]  # of the same noise

    output = first(CONTEXTS, masks=MASKS)
    inside = nn.functional.interpolate(LEFT[None, None], (tokens, tokens), mode="area") > 0
    inside = inside.flatten()[:, None] if output.ndim == 3 else inside
    torch.testing.assert_close(output, torch.where(inside, first("thick"), first(CONTEXTS["right"])), **CLOSE)
    handle.remove()


def test_an_adapted_text_encoder_has_the_context_of_the_background(tmp_path):
    name = "stable_diffusion"
    pipe = build(name)
    write_adapter(pipe.unet, tmp_path / "adapter")
    write_adapter(pipe.text_encoder, tmp_path / "adapter" / "text_encoder")
    load_context_adapter(pipe, tmp_path / "adapter")
    texts = []
    pipe.text_encoder.register_forward_hook(lambda model, args, output: texts.append(output[0]))
    draw(name, pipe, CONTEXTS | {"else": "slant"}, masks=MASKS)
    draw(name, pipe, "slant")
    assert torch.equal(texts[0], texts[len(texts) // 2])


def test_masks_of_another_size_and_families_that_are_not_known(tmp_path):
    pipe = load("pixart_sigma", tmp_path / "adapter")
    with pytest.raises(ValueError, match="masks have 12 x 12 pixels, and the image 8 x 8 latent tokens"):
        draw("pixart_sigma", pipe, {"all": "thick"}, masks={"all": torch.ones(12, 12)})
    pipe = load("chroma", tmp_path / "other")
    with pytest.raises(ValueError, match="This is a ChromaTransformer2DModel"):
        draw("chroma", pipe, CONTEXTS, masks=MASKS)
