"""FID and KID with a model of the user's choice."""

import re
import sys

import pytest
import torch
import transformers
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from hf_causal_context.errors import UserValueError
from hf_causal_context.evaluation.evaluator import evaluate_samples
from hf_causal_context.evaluation.features import frechet_and_kernel_distance, load_vision_features
from hf_causal_context.evaluation.markdown import markdown
from hf_causal_context.messages.installation import installation

from .small import CONCEPTS, OBS, PAIR, A, B, report, result_of

VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {**VISION, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}


class Quadrants(nn.Module):
    """Mean level of the four quarters of an image."""

    num_features = 4

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return nn.functional.adaptive_avg_pool2d(images[:, 0].float(), 2).flatten(1)


def images(context, seed, num=40):
    """Gray noise, of which "a" brightens the left and "b" the upper half."""
    noise = torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) / 2
    noise[:, :, :, :4] += 0.4 * ("a" in context.targets)
    noise[:, :, :4] += 0.1 * ("b" in context.targets)
    return noise


def test_distances_of_features_beside_floor_and_base():
    contexts = (OBS, A, B, PAIR)
    real = {context: images(context, n, 80) for n, context in enumerate(contexts)}
    samples = {context: [images(context, seed) for seed in (20, 21)] for context in contexts}
    samples[B] = samples[OBS]
    found = evaluate_samples(CONCEPTS, real, samples, samples[OBS], feature_extractor=Quadrants())
    for measure in ("frechet", "kernel"):
        right, wrong = (getattr(result_of(found, context), measure) for context in (PAIR, B))
        assert right.gap_closed == pytest.approx(1, abs=0.1)
        assert wrong.gap_closed == 0
        assert wrong.samples.mean == wrong.base.mean > 3 * abs(wrong.floor.mean)
    assert "## FID and KID" in markdown(found)


def test_fid_is_that_of_torchmetrics_on_the_images_themselves():
    one, other = (255 * images(context, seed).expand(-1, 3, -1, -1) for context, seed in ((OBS, 1), (A, 2)))
    metric = FrechetInceptionDistance(feature=Quadrants())
    metric.update(other.byte(), real=True)
    metric.update(one.byte(), real=False)
    fid, kid = frechet_and_kernel_distance(Quadrants()(one.byte()), Quadrants()(other.byte()))
    assert fid == pytest.approx(float(metric.compute()), rel=1e-5)
    assert frechet_and_kernel_distance(Quadrants()(one.byte()), Quadrants()(other.byte())) == (fid, kid)


def test_vectors_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"feature_extractor= takes images \(N, 1 or 3, H, W\); Real rows of context"):
        report(feature_extractor=Quadrants())
    flat = {context: torch.rand(20, 3, 8, 8) for context in (OBS, A, B)}
    samples = {context: [rows] for context, rows in flat.items()}
    with pytest.raises(ValueError, match=r"feature_extractor= returned shape \(20, 3, 8, 8\) for 20 images"):
        evaluate_samples(CONCEPTS, flat, samples, samples[OBS], feature_extractor=nn.Identity())


def test_without_torchmetrics_it_says_so_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match="FID and KID need torchmetrics: " + re.escape(installation("metrics"))):
        report(feature_extractor=Quadrants())


def test_a_vision_model_is_loaded_with_the_settings_of_its_processor(tmp_path):
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**VISION, image_size=32, patch_size=8)).eval()
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    rows = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, deviation = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=(rows / 255 - mean) / deviation).pooler_output
        features = load_vision_features(str(tmp_path))
        torch.testing.assert_close(features(rows), expected)
        # gray images of another size are brought to the model's
        assert features(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)).shape == (2, 16)


def test_the_half_of_clip_that_sees_is_taken(tmp_path):
    config = transformers.CLIPConfig(
        text_config=transformers.CLIPTextConfig(**TEXT).to_dict(),
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=8).to_dict(),
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    assert load_vision_features(str(tmp_path))(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 16)


def test_other_models_are_refused(tmp_path):
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="which takes no images. Name a vision model, such as facebook/dinov2-small"):
        load_vision_features(str(tmp_path / "text"))
    config = transformers.ViTMAEConfig(**VISION, image_size=16, patch_size=8)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path / "unpooled")
    with pytest.raises(ValueError, match="is a ViTMAEModel, which has no pooled output. Name another vision model"):
        load_vision_features(str(tmp_path / "unpooled"))
    with pytest.raises(OSError, match="nowhere"):
        load_vision_features(str(tmp_path / "nowhere"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(UserValueError, match="--feature_extractor '.*other' cannot be loaded: Unrecognized model"):
        load_vision_features(str(tmp_path / "other"))
