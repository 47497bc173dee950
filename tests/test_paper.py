"""The commands of examples/paper: every table in small, the metrics, and what happens on a second run."""

import dataclasses
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hf_causal_context import Context
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments

TINY = {"max_train_steps": 2, "train_batch_size": 8, "num_validation_images": 1, "lr_warmup_steps": 1}


@pytest.fixture
def command(monkeypatch):
    """A function that runs one of the commands; its module is `command.modules[name]`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = ("command", "grid", "mnist", "protocol", "quad", "tables", "three_d_ident")
    modules = {name: importlib.import_module(f"examples.paper.{name}") for name in names}
    monkeypatch.setattr(modules["protocol"], "NUM_SAMPLES", 20)
    monkeypatch.setattr(modules["protocol"], "BATCH", 10)
    for name in ("quad", "mnist", "three_d_ident"):
        scale = modules[name].SCALES["small"]
        settings = scale[0] if name == "quad" else scale
        monkeypatch.setitem(settings, "resolution", 28 if name == "mnist" else 16)
        for setting, value in TINY.items():
            monkeypatch.setitem(settings, setting, value)
    monkeypatch.setitem(modules["quad"].SCALES, "small", (modules["quad"].SCALES["small"][0], 20))

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        modules[name].main()

    call.modules = modules
    yield call
    for name in names:
        sys.modules.pop(f"examples.paper.{name}")


def rows(folder):
    lines = (folder / "results.md").read_text().splitlines()
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}


def test_quad(command, tmp_path, capsys):
    arguments = ("--output_dir", tmp_path, "--scale", "small")
    methods = list(command.modules["protocol"].METHODS)
    command("quad", *arguments, "--methods", *methods, "--published")
    table = rows(tmp_path)
    assert list(table) == [
        *methods,
        *(f"{method}, published" for method in methods if method.startswith("CM")),
        "real images (floor)",
    ]
    assert {"Ada-GVAE", "BetaTCVAE", "TVAE"} <= set(methods)
    assert table["CM fine-tune"][0] == "0.112 / 0.121 / 0.840"
    done = json.loads((tmp_path / "CM-fine-tune-0" / "results.json").read_text())
    world = command.modules["quad"].quad_world("small", dependent=True)
    assert list(done["distinct"]) == [str(context) for context in world.judged]
    assert len(world.held_out) == 9
    assert done["settings"]["base"].endswith("base-pooled-0")
    assert "published" in json.loads((tmp_path / "CM-pooled,-published-0" / "results.json").read_text())["settings"]
    # Untrained models are far from real images, which are near to each other.
    floor = json.loads((tmp_path / "floor-0.json").read_text())
    attributes = [done["attributes"][name] for name in ("hues", "size", "orientation")]
    for ours, real in zip(
        [done["distinct"], *attributes], [floor["distinct"], *floor["attributes"].values()], strict=True
    ):
        assert list(ours) == list(done["distinct"])
        assert np.mean(list(real.values())) < 0.5 * np.mean(list(ours.values()))
    # A second run reads what is there, adds what is not, and refuses what was made otherwise.
    before = (tmp_path / "CM-frozen-0" / "results.json").stat().st_mtime_ns
    command("quad", *arguments, "--methods", "CM frozen", "--seeds", 0, 1)
    assert (tmp_path / "CM-frozen-0" / "results.json").stat().st_mtime_ns == before
    assert list(rows(tmp_path))[:4] == ["base pooled", "CM frozen", "real images (floor)", "CM end-to-end (not run)"]
    assert rows(tmp_path)["CM frozen"][2].count("±") == 2
    other = (*arguments, "--world", "independent", "--methods", "CM end-to-end")
    with pytest.raises(SystemExit, match="results.json was made with .* Change --output_dir"):
        command("quad", *other)
    (tmp_path / "CM-end-to-end-0" / "results.json").unlink()  # as if it had been interrupted
    with pytest.raises(SystemExit, match="begun.json was made with .* Change --output_dir"):
        command("quad", *other)


def test_grid(command, tmp_path):
    axes = command.modules["grid"].AXES
    known = {field.name for field in dataclasses.fields(AutoencoderArguments)}
    assert {name for axis in axes.values() for point in axis for name in point} <= known
    command("grid", "--output_dir", tmp_path, "--scale", "small", "--vary", "beta")
    assert list(rows(tmp_path))[:4] == [f"beta {beta}" for beta in ("0.5", "1", "2", "4")]
    assert json.loads((tmp_path / "beta-4" / "CM-end-to-end-0" / "results.json").read_text())["settings"]["beta"] == 4


@pytest.fixture
def digits(tmp_path):
    """A folder with 40 random training digits and 40 others to test with."""
    generator = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = generator.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        header = np.array([2051, 40, 28, 28], dtype=">i4").tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.array([2049, 40], dtype=">i4").tobytes() + bytes(40)
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def test_mnist(command, digits):
    command("mnist", "--data_dir", digits, "--output_dir", digits / "out", "--scale", "small", "--methods", "base")
    assert rows(digits / "out")["base"][0] == "0.127 / - / 0.181"
    world = command.modules["mnist"].mnist_world("small", digits)
    trained = {bytes(p) for p in world.training().of("").numpy()}
    assert len(trained) == 40
    assert not trained & {bytes(p) for p in world.real(Context(), 40, 0).numpy()}


def test_mnist_with_a_hierarchical_model(command, digits, monkeypatch):
    arguments = ("--data_dir", digits, "--output_dir", digits / "out", "--scale", "small", "--hierarchical")
    command("mnist", *arguments, "--methods", "CM end-to-end", "CM fine-tune")
    table = rows(digits / "out")
    assert table["CM end-to-end"][0] == "0.035 / - / 0.135"  # the published NVAE
    for name in ("CM-end-to-end-0", "base-pooled-0", "CM-fine-tune-0"):
        config = json.loads((digits / "out" / name / "config.json").read_text())
        assert (config["latent_module"], config["base"]["class"]) == ("top", "HierarchicalVAE")
        assert config["base"]["size"] == 32
    with pytest.raises(SystemExit, match="'TVAE'.* need an encoder and a decoder"):
        command("mnist", *arguments, "--methods", "TVAE")


def test_mnist_attributes(command):
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 4:14, 10:12] = 255  # a line, 2 pixels wide and 10 high
    read = command.modules["mnist"]._attributes(images)
    assert {name: values[0].tolist() for name, values in read.items()} == {
        "thickness": pytest.approx([2], abs=0.6),
        "slant": [0],
        "height": [10],
        "place": [8.5, 10.5],
    }
    assert all(not values[1].any() for values in read.values())  # no ink


def test_three_d_ident_attributes(command):
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = 255
    images[:, 1, 6:10, 6:10] = 51
    read = command.modules["three_d_ident"]._attributes(images)
    assert read["background"].tolist() == [[1, 0, 0]]
    assert read["object"].tolist() == pytest.approx(np.array([[1, 0.2, 0]]))


def test_three_d_ident(command, tmp_path):
    generator = np.random.default_rng(0)
    for name in ("obs", "bg", "obj", "sl", "bg-obj", "bg-sl", "obj-sl"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(40 if "-" in name else 200):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    places = ("--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out")
    command("three_d_ident", *places, "--scale", "small", "--methods", "CM end-to-end")
    done = json.loads((tmp_path / "out" / "CM-end-to-end-0" / "results.json").read_text())
    assert list(done["distinct"]) == ["", "bg", "obj", "sl", "bg+obj", "bg+sl", "obj+sl"]
    with pytest.raises(SystemExit, match="has 40 held-out images; distance and floor need 41"):
        command.modules["protocol"].at_most(np.arange(40), 41)


def test_published_metric_repeats_the_first_samples(command):
    protocol = command.modules["protocol"]
    samples = torch.rand(protocol.NUM_SAMPLES, 3, 4, 4)
    assert torch.equal(protocol.repeated(samples), torch.cat([samples[:10], samples[:10]]))
    assert protocol.distance(samples, samples) == 0
    assert protocol.distance(samples, samples + 0.5) == pytest.approx(0.5 * 0.8, rel=0.5)
