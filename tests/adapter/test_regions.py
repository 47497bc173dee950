"""Contexts per region of an image: `intervene(model, {...}, masks={...})`."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from PIL import Image
from torch import nn

from hf_causal_context import intervene
from hf_causal_context.adapter.conditioning.regions import Places, read_regions

from ..architectures import ARCHITECTURES, UNET
from .small import VARIANTS, adapted, config, gpt2, inputs

# Each denoiser whose layers' places are known: what is computed last, and what else before it goes token by token.
LAST = {
    "unet2d": ("conv_out", []),
    "unet2d_condition": ("conv_out", []),
    "sdxl_unet": ("conv_out", []),
    "dit": ("proj_out_2", ["transformer_blocks.1.ff.net.2"]),
    "pixart": ("proj_out", ["transformer_blocks.1.ff.net.2"]),
    "sd3": ("proj_out", ["transformer_blocks.1.ff.net.2"]),
    "flux": ("proj_out", ["single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.proj_out"]),
}
TEXT = {
    "unet2d_condition": [r".*attn2\.to_[kv]"],
    "sdxl_unet": [r".*attn2\.to_[kv]"],
    "pixart": [r".*attn2\.to_[kv]", r"caption_projection\.linear_."],
    "sd3": ["context_embedder", r".*add_[kv]_proj"],
    "flux": ["context_embedder", r".*add_[kv]_proj"],
}
LEFT = torch.zeros(16, 16)
LEFT[:, :8] = 1
TOP_RIGHT = torch.zeros(16, 16)
TOP_RIGHT[:8, 8:] = 1
MASKS = {"left": LEFT, "top": TOP_RIGHT}
CONTEXTS = {"left": "thick", "top": {"slant": -0.5, "size": 2}}


def build(name, targets="all-linear", **kwargs):
    if isinstance(targets, list):
        targets = "|".join(targets)
    return adapted(ARCHITECTURES[name].build(), target_modules=targets, **kwargs)


@torch.no_grad()
def run(name, model, context, rows=2, **options):
    architecture = ARCHITECTURES[name]
    with intervene(model, context, **options):
        output = architecture.output(model(**architecture.inputs(rows)))
    return output.unflatten(1, (4, 4)).movedim(-1, 1) if name == "flux" else output  # patches


def stitched_by(run_one, background=(), contexts=CONTEXTS):
    """One run per context, put together by the masks."""
    whole = run_one(background)
    for region, mask in MASKS.items():
        inside = nn.functional.interpolate(mask[None, None], whole.shape[-2:], mode="area")
        whole = torch.where(inside > 0.5, run_one(contexts[region]), whole)
    return whole


def stitched(name, model, background=(), contexts=CONTEXTS):
    return stitched_by(lambda context: run(name, model, context), background, contexts)


@pytest.mark.parametrize("name", LAST)
def test_where_layers_go_token_by_token_each_region_is_a_run_of_its_own(name):
    last, before = LAST[name]
    model = build(name, [last, *before])
    output = run(name, model, CONTEXTS, masks=MASKS)
    torch.testing.assert_close(output, stitched(name, model), rtol=1e-5, atol=1e-5)
    contexts = [(), *CONTEXTS.values()]
    assert all((output - run(name, model, context)).abs().max() > 1e-2 for context in contexts)
    named = run(name, model, CONTEXTS | {"else": "slant"}, masks=MASKS)
    torch.testing.assert_close(named, stitched(name, model, "slant"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAST)
def test_the_same_context_everywhere_is_one_context(name):
    model = build(name)
    same = {"left": "thick+size", "top": "thick+size", "else": "thick+size"}
    expected = run(name, model, "thick+size")
    torch.testing.assert_close(run(name, model, same, masks=MASKS), expected, rtol=1e-5, atol=1e-5)
    assert (expected - run(name, model, ())).abs().max() > 1e-2


@pytest.mark.parametrize("name", TEXT)
def test_text_has_the_context_of_the_background(name):
    model = build(name, TEXT[name])
    assert torch.equal(run(name, model, CONTEXTS | {"else": "slant"}, masks=MASKS), run(name, model, "slant"))
    assert (run(name, model, "slant") - run(name, model, "thick")).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_model_has_them_too():
    model = build("dit")
    expected = {context: run("dit", model, context) for context in ("thick", ())}
    regions = run("dit", model, CONTEXTS, masks=MASKS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with intervene(model, CONTEXTS, masks=MASKS):
        torch.testing.assert_close(compiled(**ARCHITECTURES["dit"].inputs(2)).sample, regions)
    for context, output in expected.items():
        with intervene(model, context):
            torch.testing.assert_close(compiled(**ARCHITECTURES["dit"].inputs(2)).sample, output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_mechanism(variant):
    model = build("pixart", [LAST["pixart"][0]], alpha=3, **VARIANTS[variant])
    torch.testing.assert_close(
        run("pixart", model, CONTEXTS, masks=MASKS), stitched("pixart", model), rtol=1e-4, atol=1e-5
    )


def unet(targets):
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    torch.manual_seed(0)
    return adapted(UNet2DModel(**UNET, block_out_channels=(8,), **blocks), target_modules=targets)


@torch.no_grad()
def test_images_that_are_not_square():
    below = torch.zeros(8, 24)
    below[4:, :9] = 1
    sample = torch.randn(2, 3, 8, 24, generator=torch.Generator().manual_seed(0))
    model, expected = unet(["conv_out"]), {}
    for context in ((), "thick"):
        with intervene(model, context):
            expected[context] = model(sample, 5).sample
    for mask in (below, below.repeat_interleave(4, 0).repeat_interleave(4, 1)):
        with intervene(model, {"below": "thick"}, masks={"below": mask}):
            output = model(sample, 5).sample
        torch.testing.assert_close(output, torch.where(below > 0, expected["thick"], expected[()]))
    deep = unet("all-linear")
    with intervene(deep, {"below": "thick"}, masks={"below": below}):
        shown = deep(sample, 5).sample
    assert (shown - deep(sample, 5, context=()).sample).abs().max() > 1e-3


@torch.no_grad()
def test_a_token_that_is_half_inside_has_half_of_the_effect():
    model, sample = unet(["conv_out"]), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(16, 16)
    mask[:, :7] = 1  # of the fourth column of tokens, a half
    whole, none = (model(sample, 5, context=context).sample for context in ("thick", ()))
    with intervene(model, {"left": "thick"}, masks={"left": mask}):
        output = model(sample, 5).sample
    torch.testing.assert_close(output[..., 3], (whole + none)[..., 3] / 2)
    assert torch.equal(output[..., 4:], none[..., 4:])
    assert torch.equal(output[..., :3], whole[..., :3])


@pytest.mark.parametrize(
    "form",
    [
        lambda mask: mask.bool(),
        lambda mask: mask.numpy(),
        lambda mask: mask.numpy().astype(bool),
        lambda mask: Image.fromarray((255 * mask.numpy()).astype(np.uint8)),
        lambda mask: Image.fromarray((255 * mask.numpy()).astype(np.uint8)).convert("RGB"),
    ],
)
def test_images_and_arrays_are_masks(form):
    model = build("dit", ["proj_out_2"])
    masks = {name: form(mask) for name, mask in MASKS.items()}
    assert torch.equal(run("dit", model, CONTEXTS, masks=masks), run("dit", model, CONTEXTS, masks=MASKS))


def test_outside_of_the_block_all_is_as_before():
    model = build("dit")
    base = ARCHITECTURES["dit"]
    with torch.no_grad():
        plain = base.output(model(**base.inputs(2)))
    run("dit", model, CONTEXTS, masks=MASKS)
    with torch.no_grad():
        assert torch.equal(base.output(model(**base.inputs(2))), plain)
    inside = run("dit", model, CONTEXTS, masks=MASKS)
    with intervene(model, "slant"):
        assert torch.equal(run("dit", model, CONTEXTS, masks=MASKS), inside)
        assert not torch.equal(run("dit", model, "slant"), inside)


def test_one_of_two_adapters_has_regions():
    model = build("dit", ["proj_out_2"])
    model.add_adapter("other", config(("wide",), target_modules=["proj_out_2"]))
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    with intervene(model, "wide", adapter_name="other"):
        output = run("dit", model, CONTEXTS, masks=MASKS, adapter_name="default")
        expected = stitched_by(lambda context: run("dit", model, context, adapter_name="default"))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    mixed = {"left": "thick+wide", "top": "wide=2"}
    torch.testing.assert_close(
        run("dit", model, mixed, masks=MASKS), stitched("dit", model, contexts=mixed), rtol=1e-5, atol=1e-5
    )


def test_calibrated_strengths():
    knots = {"thick": [[0, 0], [0.5, 0.2], [1, 1]]}
    model = build("dit", ["proj_out_2"], calibration=knots)
    output = run("dit", model, {"left": "thick=0.5", "top": "slant"}, masks=MASKS, calibrated=True)
    assert torch.equal(output, run("dit", model, {"left": "thick=0.2", "top": "slant"}, masks=MASKS))


@pytest.mark.parametrize(
    ("contexts", "masks", "message"),
    [
        ({"left": "thick"}, {"left": torch.ones(16, 16), "top": LEFT}, "Give every mask a context of the same name"),
        ({"left": "thick", "a": "slant", "b": "slant"}, {"left": LEFT}, "at most one context more"),
        ({"left": "thick"}, {}, "Masks: none"),
        (CONTEXTS, {"left": LEFT, "top": LEFT}, "'left', 'top' overlap in 128 pixels"),
        (CONTEXTS, {"left": LEFT, "top": TOP_RIGHT[:8]}, "differ in size .'left' 16 x 16, 'top' 16 x 8."),
        ({"left": "thick"}, {"left": 0 * LEFT}, "The mask 'left' is empty"),
        ({"left": "thick"}, {"left": 255 * LEFT}, "outside of 0 to 1"),
        ({"left": "thick"}, {"left": LEFT - 1}, "outside of 0 to 1"),
        ({"left": "thick"}, {"left": LEFT[None]}, "has the shape .1, 16, 16.. Give .height, width."),
        ({"left": "wide"}, {"left": LEFT}, "Unknown concept 'wide'"),
    ],
)
def test_wrong_regions_are_refused_before_anything_is_computed(contexts, masks, message):
    with pytest.raises(ValueError, match=message):
        intervene(build("dit", ["proj_out_2"]), contexts, masks=masks)


def test_wrong_types():
    model = build("dit", ["proj_out_2"])
    with pytest.raises(TypeError, match="With masks=, contexts have the names of the masks"):
        intervene(model, "thick", masks={"left": LEFT})
    with pytest.raises(TypeError, match="The mask 'left' is a str"):
        intervene(model, {"left": "thick"}, masks={"left": "left.png"})
    with pytest.raises(ValueError, match="Strength 'thick' of concept 'left'"):  # the masks were forgotten
        intervene(model, {"left": "thick"})


@pytest.mark.parametrize("size", [(16, 32), (12, 12), (4, 4)])
def test_masks_of_another_size_than_the_image(size):
    with pytest.raises(ValueError, match=f"masks have {size[1]} x {size[0]} pixels, and the image 8 x 8 latent tokens"):
        run("dit", build("dit", ["proj_out_2"]), {"all": "thick"}, masks={"all": torch.ones(size)})


@torch.no_grad()
def test_text_that_is_as_long_as_the_image_is_told_by_its_layer():
    given = ARCHITECTURES["unet2d_condition"].inputs(2)
    given["encoder_hidden_states"] = torch.randn(2, 16, 16)  # 4 x 4 tokens
    for targets, is_text in ((r".*attn2\.to_[kv]", True), (r".*attn1\.to_[kv]", False)):
        model = build("unet2d_condition", targets)
        with intervene(model, CONTEXTS, masks=MASKS):
            output = model(**given).sample
        assert torch.equal(output, model(**given, context=()).sample) == is_text


@pytest.mark.parametrize("tokens", [(2, 7), (4, 64), (2, 8, 4)])
def test_tokens_that_are_in_no_known_place(tokens):
    _, regions = read_regions(CONTEXTS, MASKS)
    places = Places((8, 8), 2, 5, "attn2")
    assert places.weights(regions, torch.zeros(2, 5, 3), "attn2.to_k") is None
    assert places.weights(regions, torch.zeros(2, 16, 3), "odd").shape == (2, 1, 16, 1)
    with pytest.raises(ValueError, match="Layer 'odd' sees .* of 2 images with 8 x 8 tokens and 5 tokens of text each"):
        places.weights(regions, torch.zeros(*tokens, 3), "odd")


def test_models_whose_tokens_are_not_known():
    with pytest.raises(ValueError, match="This is a WanTransformer3DModel"):
        run("wan", build("wan"), CONTEXTS, masks=MASKS)
    with pytest.raises(ValueError, match="only models of transformers have an adapter here"):
        intervene(adapted(gpt2()), CONTEXTS, masks=MASKS)
    mlp = adapted()
    with intervene(mlp, CONTEXTS, masks=MASKS), pytest.raises(ValueError, match="This is a Mlp"):
        mlp(inputs())


def test_parts_that_run_on_their_own():
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = adapted(AutoencoderKL(**UNET, block_out_channels=(8,), **blocks), target_modules=["conv_in"])
    with intervene(vae, CONTEXTS, masks=MASKS), pytest.raises(ValueError, match="runs without the model's own call"):
        vae.get_base_model().decode(torch.randn(1, 4, 8, 8))


def test_regions_are_not_merged():
    model = build("dit", ["proj_out_2"])
    with intervene(model, CONTEXTS, masks=MASKS), pytest.raises(ValueError, match="Only one context can be merged"):
        model.merge_adapter()
    with intervene(model, "thick"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="is merged for the context"):
        intervene(model, CONTEXTS, masks=MASKS)
