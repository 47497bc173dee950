"""Every example runs as it stands, with fewer steps."""

import argparse
import importlib
import itertools
import os
import random
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image, ImageFont
from safetensors.torch import load_file
from tqdm import tqdm

from hf_causal_context import CausalContextConfig, Context
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data.worlds.digits import sample_digits
from hf_causal_context.quickstart import BASE


def run(monkeypatch, name, *arguments):
    module = f"examples.{name.removesuffix('.py').replace('/', '.')}"
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, module, raising=False)  # which another test may have imported
    runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("name", ["own_folder.py", "text_to_image.py"])
def test_training_examples(monkeypatch, tmp_path, name):
    run(monkeypatch, name, "--output_dir", tmp_path, "--max_train_steps", 2)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "adapter" / "samples" / "step-000002.png").exists()


def test_sliders_show_strengths_from_left_to_right_and_from_top_to_bottom(monkeypatch, tmp_path):
    base = load_base(str(BASE))
    config = CausalContextConfig(
        concepts=("thickness", "darkness", "slant", "size"), target_modules=["conv1"], init_weights=False
    )
    model = get_peft_model(base.denoiser, config)
    model.peft_config["default"].base_model_name_or_path = str(BASE)
    model.save_pretrained(tmp_path / "adapter")
    sliders, shown = importlib.import_module("examples.sliders"), []

    def blank(base, contexts, **options):
        shown.append(contexts)
        levels = [context.strengths.get("thickness", 0.0) + 1.5 for context in contexts]
        return [torch.full((1, 1, 32, 32), level / 5) for level in levels]

    monkeypatch.setattr(sliders, "generate", blank)
    given = ["", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "image.png")]
    monkeypatch.setattr(sys, "argv", given)
    sliders.main()
    assert shown[0][1] == Context({"thickness": -0.5, "slant": -1.0})
    image = Image.open(tmp_path / "image.png").convert("L")
    tiles = [image.getpixel((sliders.MARGIN + 5 + column * sliders.TILE, sliders.MARGIN + 5)) for column in range(5)]
    assert tiles == sorted(tiles, reverse=True)  # more ink, the larger the strength
    assert len(set(tiles)) == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "nowhere is no folder here"),
        ({"concepts": ["hat"]}, "Unknown concept 'slant'"),
        ({"task_type": "CAUSAL_LM"}, "is an adapter of a language model, not of a diffusers pipeline"),
    ],
)
def test_sliders_of_another_adapter_are_refused(config, message, monkeypatch, tmp_path, capsys):
    folder = tmp_path / ("nowhere" if config is None else "adapter")
    if config is not None:
        given = {"concepts": ["thickness", "darkness", "slant", "size"], "base_model_name_or_path": str(BASE)}
        CausalContextConfig(**given | config).save_pretrained(folder)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "sliders.py", "--adapter", folder, "--output", tmp_path / "image.png")
    said = capsys.readouterr().err
    assert message in said
    assert "This example draws the concepts of the quickstart's adapter: give its folder." in said


def test_language_trainers(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "language_trainers.py", "--output_dir", tmp_path, "--max_steps", 2)
    output = capsys.readouterr().out
    for name in ("transformers", "trl"):
        assert f"{name}: ['the cat" in output
        assert (tmp_path / name / "adapter_model.safetensors").exists()


@pytest.fixture
def fonts(tmp_path):
    """A folder of the one font that comes with Pillow, which has no axes."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    (folder / "default.ttf").write_bytes(ImageFont.load_default(size=20).path.getvalue())
    return folder


@pytest.fixture
def letters(monkeypatch):
    return importlib.import_module("examples.letters")


def test_letters_are_seeded_and_whole(letters, fonts):
    images = letters.sample_letters(50, fonts, seed=3)
    assert images.shape == (50, 32, 32)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(letters.sample_letters(250, fonts, seed=3)[:50], images)
    assert (letters.sample_letters(50, fonts, seed=4) != images).any()
    assert images.max(axis=(1, 2)).min() > 60  # ink in every image
    assert not images[:, [0, -1]].any()  # and none is cut
    assert not images[:, :, [0, -1]].any()
    assert not set(letters.LETTERS) & set("OoQDIlZzSsGbBgq")


def test_letters_need_fonts(letters, tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no .ttf files in .* Give a folder of fonts"):
        letters.sample_letters(1, tmp_path)


@pytest.mark.slow
def test_digits_on_a_base_of_letters(monkeypatch, tmp_path, fonts, letters, capsys):
    base, output = tmp_path / "letter-base", tmp_path / "gap"
    tiny = ("--num_images", 20, "--max_train_steps", 2, "--num_samples", 2, "--device", "cpu")
    run(monkeypatch, "pretrain.py", "--output_dir", base, "--world", "letters", "--fonts_dir", fonts, *tiny)
    assert (base / "samples.png").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny = ("--steps", 2, "--rows_per_context", 40, "--num_samples", 2)
    methods = ("base", "singles only", "singles only, no observational part", "a+b-obs")
    command = ("benchmarks/image_composition.py", "--output_dir", output, "--base", base, "--methods", *methods)
    run(monkeypatch, *command, *tiny)
    table = (output / "results.md").read_text()
    said = capsys.readouterr().out
    assert table in said
    for method in methods[1:]:
        assert f"| {method} | 2 |" in table
        assert f"letter-base, {method}, 2 updates:" in said
    assert (output / "samples-letter-base.png").exists()
    run(monkeypatch, *command, *tiny)
    assert "updates:" not in capsys.readouterr().out  # nothing is made again
    with pytest.raises(SystemExit, match="was made with .*'num_samples': 2}, not .*'num_samples': 3}"):
        run(monkeypatch, *command, *tiny[:-1], 3)


@pytest.fixture
def pretrain(monkeypatch):
    yield importlib.import_module("examples.pretrain")
    del sys.modules["examples.pretrain"]  # so that `run` can run it


class Interrupted(tqdm):
    """A progress bar in whose third step somebody presses Ctrl-C."""

    def __iter__(self):
        yield from itertools.islice(super().__iter__(), 2)
        raise KeyboardInterrupt


def test_an_interrupted_base_goes_on_to_the_same_weights(monkeypatch, tmp_path, pretrain):
    monkeypatch.setattr(pretrain, "STEPS_PER_STATE", 1)
    settings = {"max_train_steps": 3, "train_batch_size": 2, "learning_rate": 1e-3, "device": "cpu"}

    def weights(folder):
        torch.manual_seed(0)
        images = torch.arange(4 * 32 * 32).reshape(4, 1, 32, 32).remainder(256).byte()
        pretrain.pretrain(pretrain.build(), images, argparse.Namespace(output_dir=folder, **settings))
        assert not (folder / "state.pt").exists()
        return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")

    whole = weights(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            weights(tmp_path / "halves")
    assert (tmp_path / "halves" / "state.pt").exists()
    halves = weights(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@pytest.mark.parametrize("module", ["pretrain", "benchmarks.image_composition"])
def test_a_world_of_fonts_needs_their_folder(monkeypatch, tmp_path, module):
    with pytest.raises(SystemExit, match="The world type is drawn from .* by --fonts_dir"):
        run(monkeypatch, f"{module.replace('.', '/')}.py", "--output_dir", tmp_path, "--world", "type")


def test_the_worlds_of_images_say_what_is_trained_and_what_is_not(tmp_path):
    worlds = importlib.import_module("examples.benchmarks.image_worlds")
    fonts = worlds.type_world(tmp_path)
    assert [len(group) for group in fonts.groups.values()] == [4, 6, 4, 1]
    assert [len(group) for group in fonts.at_strengths.values()] == [4] * 5 + [6] * 5
    assert fonts.at_strengths["pairs x 0.25"][0] == Context({"weight": 0.25, "width": 0.25})
    assert len(fonts.contexts) == 16 + 50
    for world, combinations in ((worlds.digit_world(), 6), (worlds.type_world(tmp_path), 11)):
        assert list(world.trained) == [Context(), *map(Context, world.concepts)]
        assert set(world.trained) < set(world.seen_by_oracle) <= set(world.contexts)
        assert len(world.seen_by_oracle) == 5 + combinations
    digits = worlds.digit_world()
    assert torch.equal(digits.floor(Context("size"), 3)[:, 0] * 255, torch.from_numpy(sample_digits(3, "size", 77)[0]))
    truth = torch.from_numpy(sample_digits(3, "size", 9000, "test")[0])
    assert torch.equal(digits.truth(Context("size"), 3)[:, 0] * 255, truth)


@pytest.fixture
def movie_reviews(tmp_path):
    words = ["a", "warm", "and", "clever", "film", "about", "two", "brothers", "who", "lose", "their", "way"]
    generator = random.Random(0)
    for suffix in ("pos", "neg"):
        lines = [" ".join(generator.sample(words, len(words))) for _ in range(300)]
        (tmp_path / f"rt-polarity.{suffix}").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.slow
def test_reviews(monkeypatch, movie_reviews, capsys):
    monkeypatch.chdir(movie_reviews)
    data = ("--data_dir", movie_reviews)
    run(monkeypatch, "reviews/base.py", *data, "--max_steps", 2)
    run(monkeypatch, "reviews/base.py", *data, "--max_steps", 2, "--gap", "--output_dir", "other-base")
    plain, gap = (load_file(movie_reviews / name / "model.safetensors") for name in ("reviews-base", "other-base"))
    assert not torch.equal(plain["model.norm.weight"], gap["model.norm.weight"])
    run(monkeypatch, "reviews/adapter.py", *data, "--max_steps", 2)
    assert (movie_reviews / "reviews-context" / "adapter_model.safetensors").exists()
    assert (movie_reviews / "reviews-context" / "layers.png").exists()
    methods = ("base", "adapter", "adapter, no observational part", "stacked LoRAs", "a+b-obs")
    methods = (*methods, "control tokens", "steering vectors")
    run(monkeypatch, "reviews/compare.py", *data, "--max_steps", 2, "--num_samples", 2, "--methods", *methods)
    run(monkeypatch, "reviews/selection.py", *data)
    output = capsys.readouterr().out
    assert "ebert+question" in output
    for method in (*methods, "oracle"):
        assert f"| {method} |" in output
    assert "| selected: positive |" in output
    table = (movie_reviews / "reviews-compare" / "results.md").read_text()
    assert table in output


@pytest.mark.slow
def test_resume(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "resume.py", "--output_dir", tmp_path, "--max_train_steps", 12)
    output = capsys.readouterr().out
    assert "--resume_from_checkpoint latest" in output
    assert "identical weights: True" in output


@pytest.mark.slow
def test_two_processes_equal_one(monkeypatch, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    command += ["-m", "examples.two_processes", "--output_dir", str(tmp_path / "two"), "--max_train_steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, timeout=240, env=environment)
    from hf_causal_context import quickstart

    whole = quickstart.training_arguments(tmp_path / "one", 0)
    whole.train_batch_size, whole.max_train_steps = 20, 2
    monkeypatch.setattr(quickstart, "training_arguments", lambda folder, seed: whole)
    from hf_causal_context.training.finetune import train

    train(whole, data=quickstart.digit_data(rows_per_context=60))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
