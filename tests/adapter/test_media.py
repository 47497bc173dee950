"""Images, videos and sounds beside text: their rows are not those of the samples."""

import pytest
import torch
import transformers

from hf_causal_context import intervene

from ..architectures import ARCHITECTURES, IMAGE_TOKEN, LLAMA
from .small import adapted

CONTEXTS = ["thick", "slant"]
VIDEO_TOKEN, GRID = 61, torch.tensor([[1, 4, 4]])  # 16 patches, 4 tokens
TWO_IMAGES = [58, *[IMAGE_TOKEN] * 4, 59, 58, *[IMAGE_TOKEN] * 4, 59, 7]
RAGGED = "with different numbers of images, videos or sounds"


def llava(targets):
    torch.manual_seed(0)
    return adapted(ARCHITECTURES["llava"].build(), target_modules=targets, alpha=8.0)


def qwen():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
    tokens |= {"vision_start_token_id": 58, "vision_end_token_id": 59}
    config = transformers.Qwen2VLConfig(
        text_config=LLAMA | {"rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        **tokens,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    return adapted(model, target_modules=r".*visual\.(blocks|merger).*\.(qkv|mlp\.[02])", alpha=8.0)


def qwen2_audio():
    audio = {"num_mel_bins": 4, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = transformers.Qwen2AudioConfig(
        audio_config=audio | {"d_model": 16, "max_source_positions": 8},
        text_config=LLAMA | {"model_type": "qwen2"},
        audio_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    return adapted(model, target_modules=r".*audio_tower.*q_proj", alpha=8.0)


def texts(*counts, token=IMAGE_TOKEN):
    """Texts of one length, each with so many tokens of a medium, in a group of their own."""
    length = 4 + max(counts)
    rows = [[5] * (length - count - 3) + [58] + [token] * count + [59, 7] for count in counts]
    ids = torch.tensor([row if count else [6] * length for row, count in zip(rows, counts, strict=True)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def patches(*grids, video=False):
    """What Qwen2-VL reads of images (or videos) with so many frames each."""
    grid = torch.cat([GRID * torch.tensor([frames, 1, 1]) for frames in grids])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(1))
    return (
        {"pixel_values_videos": pixels, "video_grid_thw": grid}
        if video
        else {
            "pixel_values": pixels,
            "image_grid_thw": grid,
        }
    )


def with_types(inputs):
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == IMAGE_TOKEN).long() + 2 * (ids == VIDEO_TOKEN)}


def options(model, **settings):
    model.get_base_model().generation_config.eos_token_id = None
    model.get_base_model().generation_config.pad_token_id = 0
    asked = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return asked | settings


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: llava(r".*vision.*q_proj"), lambda: texts(8, 0) | {"pixel_values": torch.randn(2, 3, 8, 8)}),
        (lambda: llava(r".*projector.linear_1"), lambda: texts(8, 0) | {"pixel_values": torch.randn(2, 3, 8, 8)}),
        (qwen, lambda: with_types({"input_ids": torch.tensor([TWO_IMAGES, [6] * 13])}) | patches(1, 1)),
        (qwen, lambda: with_types(texts(12, 4, token=VIDEO_TOKEN)) | patches(3, 1, video=True)),
        (
            qwen2_audio,
            lambda: (
                texts(8, 0)
                | {
                    "input_features": torch.randn(2, 4, 16),
                    "feature_attention_mask": torch.ones(2, 16, dtype=torch.long),
                }
            ),
        ),
    ],
    ids=["images", "images, behind the tower", "patches of images", "frames of videos", "sounds"],
)
def test_media_that_samples_have_different_numbers_of_need_one_context(build, inputs):
    model, values = build(), inputs()
    model(**values, context="thick")
    with pytest.raises(ValueError, match=RAGGED):
        model(**values, context=CONTEXTS)


@pytest.mark.parametrize("by_name", [(), ("pixel_values",)], ids=["both", "texts"])
def test_so_do_those_that_are_given_by_position(by_name):
    model, pixels = llava(r".*vision.*q_proj").get_base_model(), torch.randn(2, 3, 8, 8)
    named = dict.fromkeys(by_name, pixels)
    for counts in ((4, 4), (8, 0)):
        positional = [texts(*counts)["input_ids"], pixels][: 2 - len(named)]
        assert (model(*positional, **named, context="thick").logits - model(*positional, **named).logits).any()
        if counts == (4, 4):
            model(*positional, **named, context=CONTEXTS)
        else:
            with pytest.raises(ValueError, match=RAGGED):
                model(*positional, **named, context=CONTEXTS)


class TestGenerate:
    """It encodes the media before it calls the model."""

    def test_different_numbers_of_images_need_one_context(self):
        model, values = llava(r".*vision.*q_proj"), texts(8, 0) | {"pixel_values": torch.randn(2, 3, 8, 8)}
        with intervene(model, "thick"):
            model.generate(**values, **options(model))
        with intervene(model, CONTEXTS), pytest.raises(ValueError, match=RAGGED):
            model.generate(**values, **options(model))
        ids = values.pop("input_ids")
        with intervene(model, CONTEXTS), pytest.raises(ValueError, match=RAGGED):
            model.generate(ids, **values, **options(model))

    @pytest.mark.parametrize("beams", [1, 2])
    def test_patches_have_the_context_of_their_prompt(self, beams):
        model, both = qwen(), with_types(texts(4, 4)) | patches(1, 1)

        def logits(values, context):
            with intervene(model, context):
                found = model.generate(**values, **options(model, num_beams=beams)).logits
            return torch.stack(found, 1)

        halves = [{name: value.chunk(2)[row] for name, value in both.items()} for row in (0, 1)]
        apart = torch.cat([logits(*each) for each in zip(halves, CONTEXTS, strict=True)])
        torch.testing.assert_close(logits(both, CONTEXTS), apart, rtol=1e-4, atol=1e-5)
        assert (apart - logits(both, "thick")).abs().max() > 1e-3
