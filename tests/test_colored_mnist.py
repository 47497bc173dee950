"""The benchmark of colored digits: what it trains on, what it counts, and that it goes on."""

import gzip
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from examples.benchmarks import colored_mnist, composition_methods
from hf_causal_context import Context


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture
def mnist_dir(tmp_path):
    """A thousand digits in each split, in MNIST's own format."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 28, 28), np.uint8)  # few enough for the principal directions to hold them
    labels = np.tile(np.arange(10, dtype=np.uint8), 100)
    images = patterns[labels]
    for split in ("train", "t10k"):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x0800 + values.ndim, *values.shape], ">u4").tobytes()
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return folder


@pytest.fixture
def data(mnist_dir):
    return colored_mnist.ColoredDigits(mnist_dir)


def test_training_sees_a_fifth_of_the_combinations(data):
    seen = data.sets("train", full_support=False, seed=0)
    assert {str(context) for context in seen if "digit9" in context.targets} == {"color9+digit9", "color0+digit9"}
    assert len(seen) == 20
    assert sum(map(len, seen.values())) == 1000  # every digit once
    everything = data.sets("train", full_support=True, seed=0)
    assert len(everything) == 100
    assert sum(map(len, everything.values())) == 1000


def test_rows_have_the_color_that_their_context_names_and_a_mean_square_of_one(data):
    sets = data.sets("train", full_support=True, seed=0)
    assert torch.cat(list(sets.values())).square().mean().item() == pytest.approx(1, abs=0.1)
    for context, (red, green, blue) in (("digit1+color0", (1, 0, 0)), ("digit7+color5", (0, 1, 1))):
        rows = sets[Context.parse(context)].unflatten(1, (3, -1))
        ink = rows.abs().amax(dim=(1, 2))
        for channel, share in zip(rows.unbind(1), (red, green, blue), strict=True):
            torch.testing.assert_close(channel.abs().amax(dim=1), share * ink)


def test_coordinates_become_the_images_again(data):
    sets = data.sets("test", full_support=True, seed=0)
    images = torch.cat([data.images(rows) for rows in sets.values()])
    assert images.shape == (1000, 3, 28, 28)
    truth = data._gray("test")[0].sum()
    assert images.amax(dim=1).sum().item() == pytest.approx(truth.item(), rel=0.02)


def test_dropped_labels_pool_the_seen_rows(data):
    sets = colored_mnist.with_dropped_labels(data.sets("train", full_support=False, seed=0))
    assert len(sets) == 41
    assert len(sets[Context()]) == 1000
    assert len(sets[Context("digit3")]) == 100
    own = (sets[Context("digit3", "color3")], sets[Context("digit2", "color3")])
    assert len(sets[Context("color3")]) == sum(map(len, own))


def test_conformity_counts_both_labels_and_each():
    right = torch.nn.functional.one_hot(torch.tensor([[0, 0], [0, 7]]), 10)  # digit 0; color 0, color 7

    def reader(rows):
        return right[rows]

    rows = {context: torch.tensor([0]) for context in colored_mnist.COMBINATIONS}
    assert colored_mnist.conformity(reader, rows) == pytest.approx(
        {"seen": 0.05, "seen: digit": 0.1, "seen: color": 0.1, "unseen": 0, "unseen: digit": 0.1, "unseen: color": 0.1}
    )
    rows[Context("digit0", "color7")] = torch.tensor([1])
    assert colored_mnist.conformity(reader, rows)["unseen"] == pytest.approx(1 / 80)


def test_the_colored_benchmark_goes_on_where_it_was_stopped(monkeypatch, tmp_path, mnist_dir, capsys):
    tiny = ("--base_steps", 1, "--steps", 1, "--batch_size", 4, "--samples_per_combination", 1)
    command = ("--mnist_dir", mnist_dir, "--output_dir", tmp_path / "out", *tiny)
    monkeypatch.setattr(composition_methods, "sample", partial(composition_methods.sample, steps=1))
    monkeypatch.setattr(colored_mnist, "READER_STEPS", 1)
    with monkeypatch.context() as patch:
        patch.setitem(colored_mnist.METHODS, "oracle", None)  # stops it there
        with pytest.raises(TypeError):
            run(monkeypatch, colored_mnist, *command)
    before = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert list(before) == ["real images", "base", "multi-hot LoRA", "CoInD", "this adapter"]
    capsys.readouterr()
    run(monkeypatch, colored_mnist, *command)
    said = capsys.readouterr().out
    assert "oracle: " in said
    assert "this adapter: " not in said
    after = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {name: after[name] for name in before} == before
    assert "| this adapter | " in said
    with pytest.raises(SystemExit, match="was made with .*'steps': 1.*, not .*'steps': 2"):
        run(monkeypatch, colored_mnist, *command, "--steps", 2)
