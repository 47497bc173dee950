"""The commands `info` and `merge`."""

import json
import re
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_causal_context import CausalContextConfig, causal_effects, intervene
from hf_causal_context.adapter.calibration import store_calibration
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main

from .training.conftest import pipeline_folder  # noqa: F401 (a fixture)
from .training.small_language import language_model, word_tokenizer

SETTINGS = {"concepts": ("thick", "slant"), "init_weights": False, "mechanism": "reduced"}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def images(pipeline_folder, tmp_path):  # noqa: F811
    """A denoiser with an adapter, which is stored in the folder `adapter`."""
    base = pipeline_folder("ddpm")
    model = get_peft_model(load_base(base).denoiser, CausalContextConfig(**SETTINGS)).eval()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.fixture
def texts(tmp_path):
    """A language model with an adapter, which is stored in the folder `adapter`."""
    language_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    config = CausalContextConfig(**SETTINGS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return model


def info(*arguments, capsys):
    assert main(["info", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_says_what_an_adapter_holds(images, tmp_path, capsys):
    card = {"descriptions": {"thick": "strokes are thicker"}, "license": "mit"}
    (tmp_path / "adapter" / "card.json").write_text(json.dumps(card))
    for part in ("text_encoder", "checkpoint-2"):  # the latter is no part of it
        shutil.copytree(tmp_path / "adapter", tmp_path / part)
    for part in ("text_encoder", "checkpoint-2"):
        shutil.move(tmp_path / part, tmp_path / "adapter" / part)
    record = {"trained": {"": 4, "thick": 3}, "held_out": {"slant+thick": 2}}
    (tmp_path / "adapter" / "training_data.json").write_text(json.dumps(record))
    found = info(tmp_path / "adapter", capsys=capsys)
    assert found["concepts"] == {"thick": "strokes are thicker", "slant": ""}
    assert found["base"] == images.peft_config["default"].base_model_name_or_path
    assert (found["makes"], found["mechanism"], found["license"]) == ("images", "reduced", "mit")
    assert (found["concept_rank"], found["observational_rank"]) == (4, 16)
    of_a_part = sum(p.numel() for name, p in images.named_parameters() if "causal_context" in name)
    assert found["parameters"] == 2 * of_a_part
    assert (found["trained_on"], found["held_out"]) == (record["trained"], record["held_out"])
    assert found["other_parts"] == ["text_encoder"]
    assert "fits" not in found
    assert main(["info", str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().out
    assert "concepts:            thick: strokes are thicker, slant\n" in said
    assert "trained on:          obs: 4, thick: 3\n" in said


def test_info_shows_no_control_characters_of_a_stranger(images, tmp_path, capsys):
    (tmp_path / "adapter" / "card.json").write_text(json.dumps({"descriptions": {"thick": "\x1b[2Jgone"}}))
    (tmp_path / "adapter" / "training_data.json").write_text("[1, 2")
    assert main(["info", str(tmp_path / "adapter")]) == 0
    assert "thick: ?[2Jgone, slant" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_info_says_how_much_concepts_change_a_base(kind, request, tmp_path, capsys):
    model = request.getfixturevalue(kind)
    base = model.peft_config["default"].base_model_name_or_path
    found = info(tmp_path / "adapter", "--pretrained_model_name_or_path", base, capsys=capsys)
    assert found["makes"] == kind
    assert found["fits"] == base
    changes = causal_effects(model).changes.mean(0).tolist()
    assert list(found["relative_change"].values()) == pytest.approx(changes, rel=1e-5)


def test_info_says_that_a_base_does_not_fit(images, pipeline_folder, tmp_path, capsys):  # noqa: F811
    other = str(pipeline_folder("stable_diffusion"))
    assert main(["info", str(tmp_path / "adapter"), "--pretrained_model_name_or_path", other]) == 1
    assert "needs a UNet2DModel, which StableDiffusionPipeline does not have" in capsys.readouterr().err


def test_a_merged_pipeline_needs_neither_the_adapter_nor_peft(images, tmp_path, capsys):
    command = ["merge", str(tmp_path / "adapter"), "--context", "thick=0.5,slant", "--output_dir"]
    assert main([*command, str(tmp_path / "merged")]) == 0
    unet = DiffusionPipeline.from_pretrained(tmp_path / "merged").unet.eval()
    assert not [name for name, _ in unet.named_parameters() if "causal_context" in name]
    noise = torch.randn(2, unet.config.in_channels, 16, 16)
    with torch.no_grad():
        with intervene(images, "thick=0.5,slant"):
            wanted = images(noise, 10).sample
        assert torch.allclose(unet(noise, 10).sample, wanted, atol=1e-4)
        assert not torch.allclose(images(noise, 10).sample, wanted, atol=1e-2)
    assert main([*command, str(tmp_path / "merged")]) == 1
    assert "merged exists and is not empty. Choose another --output_dir" in capsys.readouterr().err


def test_a_merged_language_model_comes_with_its_tokenizer(texts, tmp_path):
    merged = str(tmp_path / "merged")
    assert main(["merge", str(tmp_path / "adapter"), "--context", "obs", "--output_dir", merged]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("a cat sat", return_tensors="pt").input_ids
    with torch.no_grad():
        with intervene(texts, ()):
            wanted = texts(ids).logits
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)
        assert not torch.allclose(texts(ids).logits, wanted, atol=1e-2)


def test_a_calibrated_strength_is_that_which_is_meant(images, tmp_path, capsys):
    adapter = str(tmp_path / "adapter")
    assert info(adapter, capsys=capsys)["calibrated"] == []
    command = ["merge", adapter, "--context", "thick=0.5", "--calibrated", "--output_dir", str(tmp_path / "merged")]
    assert main(command) == 1
    assert "no calibration of 'thick'" in capsys.readouterr().err
    store_calibration(tmp_path / "adapter", [""], {"thick": [[0, 0], [0.5, 0.25], [1, 1]]})
    assert main(["info", adapter]) == 0
    assert "\ncalibrated:          thick\n" in capsys.readouterr().out
    assert main(command) == 0
    unet = DiffusionPipeline.from_pretrained(tmp_path / "merged").unet.eval()
    noise = torch.randn(2, unet.config.in_channels, 16, 16)
    for strength, same in ((0.25, True), (0.5, False)):
        with torch.no_grad(), intervene(images, {"thick": strength}):
            assert torch.allclose(unet(noise, 10).sample, images(noise, 10).sample, atol=1e-4) == same


def test_options_that_would_do_nothing_are_told(texts, tmp_path, capsys):
    adapter, base = str(tmp_path / "adapter"), str(tmp_path / "base")
    out = ["--output_dir", str(tmp_path / "out"), "--variant", "fp16"]
    of_texts = "is an adapter of a language model, so --variant would have no effect. Leave it out."
    without = "so --revision, --variant would have no effect"
    for command, message in (
        (["info", adapter, "--revision", "old", "--variant", "fp16"], f"No base is given .*{without}"),
        (["info", adapter, "--variant", "fp16", "--pretrained_model_name_or_path", base], of_texts),
        (["merge", adapter, "--context", "thick", *out], of_texts),
        (["export", adapter, "--contexts", "thick", "--format", "peft", *out], of_texts),
        (
            ["push", adapter, "--private", "--branch", "v2"],
            r"No repository is given \(--repo_id\), so --private, --branch",
        ),
    ):
        assert main(command) == 1
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_unknown_concept_is_told_before_the_base_is_loaded(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    command = ["merge", str(tmp_path / "adapter"), "--context", "thik", "--output_dir", str(tmp_path / "merged")]
    assert main(command) == 1
    assert "Unknown concept 'thik'" in (said := capsys.readouterr().err)
    assert "Did you mean 'thick'?" in said
    assert not (tmp_path / "merged").exists()
