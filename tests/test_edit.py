"""The command `edit`."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from hf_causal_context import CausalContextConfig, counterfactual
from hf_causal_context.adapter.calibration import store_calibration
from hf_causal_context.bases.images import to_image
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.counterfactuals import Sampler

from .training.conftest import pipeline_folder  # noqa: F401 (a fixture)

STEPS = ["--num_inference_steps", "3"]


@pytest.fixture
def base(pipeline_folder, tmp_path, monkeypatch):  # noqa: F811
    """A base with an adapter, which is stored in the folder `adapter` beside two images."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    base = load_base(pipeline_folder("ddpm"))
    config = CausalContextConfig(concepts=("thick", "slant"), init_weights=False)
    model = get_peft_model(base.denoiser, config).eval()
    model.peft_config["default"].base_model_name_or_path = str(pipeline_folder("ddpm"))
    model.save_pretrained("adapter")
    for seed, name in enumerate(("one", "two")):
        pixels = np.random.default_rng(seed).integers(256, size=(base.default_resolution,) * 2 + (3,), dtype=np.uint8)
        Image.fromarray(pixels).convert("L").save(f"{name}.png")
    return base


def edit(*arguments):
    return main(["edit", "adapter", *STEPS, "--output_dir", "edits", *map(str, arguments)])


@pytest.mark.filterwarnings("ignore:.*The reconstruction did not hold")
def test_the_files_are_what_counterfactual_returns(base, tmp_path, capsys):
    images = ["--images", "one.png", "two.png"]
    assert edit(*images, "--contexts", "thick", "slant+thick", "--from_context", "slant", "--strengths", 0.5, 1) == 0
    said = capsys.readouterr().out.splitlines()
    names = {f"{name}-{end}.png" for name in ("one", "two") for end in ("thick", "thick-0.5", "reconstruction")}
    names |= {f"{name}-slant+thick{end}.png" for name in ("one", "two") for end in ("", "-0.5")}
    assert {path.name for path in (tmp_path / "edits").iterdir()} == names
    assert {f"edits/{name}" for name in names} <= set(said)
    given = [Image.open("one.png"), Image.open("two.png")]
    for context in ("thick", "slant+thick"):
        found = counterfactual(base, given, context, "slant", strengths=[0.5, 1.0], num_inference_steps=3)
        for end, edits in zip(("-0.5", ""), found.images, strict=True):
            for name, expected in zip(("one", "two"), edits, strict=True):
                made = np.asarray(Image.open(f"edits/{name}-{context}{end}.png"), dtype=int)
                assert np.abs(made - np.asarray(to_image(expected))).max() <= 1
        assert f"one: reconstruction error {float(found.reconstruction_error[0]):.4f}" in "\n".join(said)


@pytest.mark.filterwarnings("ignore:.*The reconstruction did not hold")
def test_calibrated_strengths_are_those_that_are_meant_on_the_way_too(base, tmp_path, capsys):
    command = ["--image", "one.png", "--context", "thick", "--strengths", 0.5, "--calibrated"]
    assert edit(*command) == 1
    assert "no calibration of 'thick'" in capsys.readouterr().err
    store_calibration(tmp_path / "adapter", [""], {"thick": [[0, 0], [0.5, 0.25], [1, 1]]})
    assert edit(*command) == 0
    found = counterfactual(base, Image.open("one.png"), {"thick": 0.25}, num_inference_steps=3)
    made = np.asarray(Image.open("edits/one-thick-0.5.png"), dtype=int)
    assert np.abs(made - np.asarray(to_image(found.images[0, 0]))).max() <= 1
    assert edit(*command[:-1]) == 0
    assert np.abs(made - np.asarray(Image.open("edits/one-thick-0.5.png"))).max() > 1


@pytest.mark.filterwarnings("ignore:.*The reconstruction did not hold")
def test_contexts_share_one_abduction_which_quiet_shows_no_bar_of(base, monkeypatch, capsys):
    monkeypatch.setattr("hf_causal_context.messages.progress._SECONDS_BEFORE", 0)
    backward, images = Sampler.backward, []
    monkeypatch.setattr(Sampler, "backward", lambda self, *args: images.append(len(args[0])) or backward(self, *args))
    command = ["--images", "one.png", "two.png", "--contexts", "thick", "slant", "thick", "--strengths", 1, 1]
    assert edit(*command) == 0
    assert images == [2]
    said = capsys.readouterr()
    assert "edit: 100%" in said.err
    files = [f"edits/{name}-{end}.png" for name in ("one", "two") for end in ("thick", "slant", "reconstruction")]
    assert [line for line in said.out.splitlines() if line.startswith("edits/")] == files
    monkeypatch.setattr("hf_causal_context.commands.verbosity._LIBRARIES", {})  # which would stay quiet afterwards
    monkeypatch.setattr("hf_causal_context.messages.progress._quiet", False)  # comes back afterwards
    assert edit(*command, "--quiet") == 0
    assert "edit:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "options", "twice"),
    [
        (["one", "one-thick"], ["--contexts", "thick-slant", "slant"], "edits/one-thick-slant.png"),
        (["one"], ["--contexts", "a_b", "a b"], "edits/one-a_b.png"),
        (["one"], ["--context", "reconstruction"], "edits/one-reconstruction.png"),
        (["one"], ["--context", "thick", "--strengths", "0.12345678", "0.12345679"], "edits/one-thick-0.123457.png"),
        (["one", "One"], ["--context", "thick"], "edits/one-reconstruction.png, edits/One-reconstruction.png"),
        (["one", "one-thick"], ["--context", "thick", "--output_dir", "."], "one-thick.png"),
        (["one", "one-reconstruction"], ["--context", "thick", "--output_dir", "."], "one-reconstruction.png"),
    ],
)
def test_files_that_would_be_written_over_are_named_before_any_work(base, capsys, monkeypatch, images, options, twice):
    monkeypatch.setattr(StoredAdapter, "pipeline", None)
    for name in images[1:]:
        Image.open("one.png").save(f"{name}.png")
    assert edit("--images", *(f"{name}.png" for name in images), *options) == 1
    assert f"{twice}: an edit would be written over" in capsys.readouterr().err


def test_a_mask_keeps_the_rest_of_an_image(base, monkeypatch):
    side = base.default_resolution
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[:, side // 2 :] = 255
    Image.fromarray(mask).save("mask.png")
    monkeypatch.setattr("hf_causal_context.inference.counterfactuals.VISIBLE_ERROR", -1.0)
    with pytest.warns(UserWarning, match=r"one: The reconstruction did not hold.*one-reconstruction\.png"):
        assert edit("--image", "one.png", "--context", "thick", "--mask", "mask.png") == 0
    given, made = (np.asarray(Image.open(path).convert("RGB")) for path in ("one.png", "edits/one-thick.png"))
    assert (made[mask == 0] == given[mask == 0]).all()
    assert (made[mask > 0] != given[mask > 0]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "one.png", "sub/one.png", "--context", "thick"], "one: several images have this name"),
        (["--image", "nowhere.png", "--context", "thick"], "--images: nowhere.png cannot be read as an image (No such"),
        (
            ["--image", "one.png", "--context", "thick", "--mask", "adapter"],
            "--mask: adapter cannot be read as an image",
        ),
        (["--image", "adapter/adapter_config.json", "--context", "thick"], "cannot identify image file"),
        (["--image", "one.png", "--context", "thik"], "thik"),
        (["--image", "one.png", "--context", "thick", "--from_context", "thik"], "thik"),
        (["--image", "one.png", "--context", "thick", "--batch_size", "0"], "--batch_size=0 must be at least 1"),
        (["--image", "one.png", "--context", "thick", "--num_inference_steps", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_edited_is_refused_and_nothing_is_written(base, tmp_path, capsys, arguments, message):
    assert edit(*arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "edits").exists()


@pytest.mark.filterwarnings("ignore:.*The reconstruction did not hold")
def test_what_is_cut_off_and_what_is_replaced_is_said(base, capsys):
    Image.new("L", (40, 16)).save("wide.png")
    assert edit("--image", "wide.png", "--context", "thick") == 0
    said = capsys.readouterr().out
    assert "wide: edits are squares, so of its 40 x 16 pixels the 16 x 16 in the middle are kept.\n" in said
    assert "Replaced" not in said
    assert edit("--image", "wide.png", "one.png", "--context", "thick") == 0
    said = capsys.readouterr().out
    assert "Replaced files of the same names: 2.\n" in said
    assert "one: edits are squares" not in said


@pytest.mark.filterwarnings("ignore:.*The reconstruction did not hold")
def test_what_of_an_image_is_not_used_is_said(base):
    first, second = (Image.open(f"{name}.png") for name in ("one", "two"))
    first.save("moving.gif", save_all=True, append_images=[second])
    first.convert("RGBA").save("opaque.png")
    first.putalpha(128)
    first.save("glass.png")
    with (
        pytest.warns(UserWarning, match=r"1 images \(moving.gif\) have several frames. Only the first is used."),
        pytest.warns(UserWarning, match=r"1 images \(glass.png\) are transparent in places. These are white;"),
    ):
        assert edit("--images", "moving.gif", "opaque.png", "glass.png", "--context", "thick") == 0


def test_numbers_of_which_nobody_knows_the_white_are_refused(base, tmp_path, capsys):
    Image.new("F", (16, 16)).save("float.tiff")
    assert edit("--image", "float.tiff", "--context", "thick") == 1
    assert "The image 'float.tiff' holds floating point numbers, and nothing says" in capsys.readouterr().err
    assert not (tmp_path / "edits").exists()
