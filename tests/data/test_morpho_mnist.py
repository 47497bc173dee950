"""The rebuilt world of Morpho-MNIST: its recipe, its truth, and the counterfactual benchmark on it."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from skimage.draw import line
from skimage.morphology import dilation, disk

from examples.benchmarks import counterfactual_benchmark
from examples.benchmarks.counterfactual_metrics import kernel_distances
from examples.benchmarks.counterfactual_study import digit_task, morpho_task
from examples.worlds import morpho_mnist as world
from hf_causal_context import Context
from hf_causal_context.contexts import as_context


def strokes(num, seed=0):
    """Digits of two strokes each."""
    rng = np.random.default_rng(seed)
    images = np.zeros((num, 28, 28), np.uint8)
    for image in images:
        for _ in range(2):
            image[line(*rng.integers(5, 23, 4))] = 255
        image[...] = dilation(image, disk(1))
    return images


@pytest.fixture
def folders(tmp_path):
    """MNIST's files and the published test images, of strokes."""
    rng = np.random.default_rng(1)
    mnist, public = tmp_path / "mnist", tmp_path / "public"
    for folder in (mnist, public):
        folder.mkdir()
    classes = (np.arange(60) % 10).astype(np.uint8)
    thickness, noise = world.sample_noise(60, rng)
    level = world.intensity(thickness, noise)
    drawn = world.draw(strokes(60), thickness, level)
    for path, images in ((mnist / "t10k", strokes(60)), (public / "t10k", drawn), (mnist / "train", strokes(60, 5))):
        for kind, values in (("images-idx3", images), ("labels-idx1", classes)):
            header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
            with gzip.open(f"{path}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + values.tobytes())
    rows = [f"{i},{t},{n}" for i, (t, n) in enumerate(zip(thickness, level, strict=True))]
    (public / "t10k-morpho.csv").write_text("\n".join(["index,thickness,intensity", *rows]))
    return mnist, public


def test_digits_get_the_thickness_and_intensity_that_are_asked_for():
    thickness, level = np.array([1.5, 2.0, 3.0, 4.0]), np.array([90.0, 120.0, 200.0, 240.0])
    measured = world.measure(world.draw(strokes(4), thickness, level))
    np.testing.assert_allclose(measured[:, 0], thickness, atol=0.1)
    np.testing.assert_allclose(measured[:, 1], level, atol=2)


def test_thickness_causes_intensity_by_the_published_formula():
    assert world.intensity(np.array([2.5]), np.array([0.0])) == pytest.approx(64 + 191 / 2)
    thickness, noise = world.sample_noise(20_000, np.random.default_rng(0))
    assert thickness.mean() == pytest.approx(2.5, abs=0.02)
    assert thickness.std() == pytest.approx(10**0.5 / 5, abs=0.02)
    assert np.abs(noise.mean()) < 0.03
    np.testing.assert_allclose(world.noise(thickness, world.intensity(thickness, noise))[:99], noise[:99], atol=1e-6)


def test_an_intervention_on_thickness_moves_intensity_and_one_on_intensity_cuts_that():
    thickness, noise = np.array([2.0, 3.0]), np.array([0.5, -0.5])
    t, i = world.under(Context("thick"), thickness, noise)
    assert (t == 4).all()
    assert (i > world.intensity(thickness, noise)).all()
    t, i = world.under(Context("dark"), thickness, noise)
    np.testing.assert_array_equal([t, i], [thickness, [90, 90]])
    t, i = world.under(Context("dark", "thick"), thickness, noise)
    np.testing.assert_array_equal([t, i], [[4, 4], [90, 90]])


@pytest.mark.parametrize("context", [{"thick": 0.5}, ("thick", "thin"), ("dark", "bright", "thin"), "tick"])
def test_contexts_that_the_world_does_not_have(context):
    with pytest.raises(ValueError, match="is no context of this world|Unknown concept 'tick'"):
        world.under(as_context(context), np.ones(2), np.zeros(2))


def test_the_truth_without_an_intervention_is_the_published_image(folders):
    task = morpho_task(8, 0, *folders)
    np.testing.assert_array_equal(task.truth(Context()), task.factual[0])
    measured = task.measure(task.truth(Context("dark", "thick")))
    np.testing.assert_allclose(np.median(measured[:, :2], axis=0), [4, 90], atol=0.1)
    assert task.moved(Context("thick")).tolist() == [True, True, False, False, False]
    assert task.moved(Context("dark")).tolist() == [False, True, False, False, False]


def test_the_truth_of_digits_has_the_same_noise():
    task = digit_task(4, 0)
    assert task.truth(Context("slant")).shape == (4, 32, 32)
    np.testing.assert_array_equal(task.truth(Context()), task.factual[0])
    assert task.moved(Context("thickness")).tolist() == [True, True, False, False]


def test_the_kernel_distance_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2000, 4, generator=generator), torch.randn(500, 4, generator=generator)
    distances = kernel_distances(a, b)
    assert abs(distances.mean()) < 3 * distances.std(ddof=1) / len(distances) ** 0.5
    assert kernel_distances(a + 0.5, b).mean() > 0.2


def test_results_of_other_settings_are_refused_also_where_older_ones_noted_fewer(tmp_path):
    defaults = {"num_images": 64, "max_train_steps": 300}
    counterfactual_benchmark.check_settings(tmp_path / "new", {"num_images": 8, "max_train_steps": 300}, defaults)
    counterfactual_benchmark.check_settings(tmp_path / "new", {"num_images": 8, "max_train_steps": 300}, defaults)
    with pytest.raises(SystemExit, match=r"was made with {'max_train_steps': 300}, not {'max_train_steps': 11}"):
        counterfactual_benchmark.check_settings(tmp_path / "new", {"num_images": 8, "max_train_steps": 11}, defaults)
    older = tmp_path / "older" / "seed-1"
    older.mkdir(parents=True)
    torch.save({"settings": {"num_images": 8}, "edits": {}}, older / "no-edit.pt")
    torch.save({}, older / "predictor.pt")
    with pytest.raises(SystemExit, match=r"no-edit.pt was made with {'max_train_steps': 300}, not"):
        counterfactual_benchmark.check_settings(older.parent, {"num_images": 8, "max_train_steps": 11}, defaults)
    assert not (older.parent / "settings.json").exists()
    counterfactual_benchmark.check_settings(older.parent, {"num_images": 8, "max_train_steps": 300}, defaults)
    assert (older.parent / "settings.json").exists()


@pytest.mark.slow
def test_the_benchmark_compares_all_methods_and_goes_on_where_it_was_stopped(folders, tmp_path, monkeypatch, capsys):
    mnist, public = folders
    sizes = {"num_images": 8, "num_inference_steps": 4, "rows_per_context": 15, "base_steps": 2, "max_train_steps": 11}
    options = [f"--{name}={value}" for name, value in (sizes | {"autoencoder_steps": 2}).items()]
    options += ["--world=morpho_mnist", f"--mnist_dir={mnist}", f"--public_dir={public}", f"--output_dir={tmp_path}"]
    monkeypatch.setattr("examples.benchmarks.counterfactual_metrics.PER_CONTEXT", 20)
    monkeypatch.setattr("examples.benchmarks.counterfactual_benchmark.NULL_EDITS", 2)
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    counterfactual_benchmark.main()
    said = capsys.readouterr().out
    for method in (*counterfactual_benchmark.METHODS, "the truth"):
        assert said.count(f"\n| {method} | ") == 3
    assert "\n| this adapter | 0.0000 ± 0.0000 | 0.0000 ± 0.0000 | 0.0000 ± 0.0000 | 0.0000 ± 0.0000 |" in said
    row = {}  # of the context dark+thick: means of every method
    for title in ("RMSE", "RMSE, more than this adapter, trained on pairs"):
        head, *lines = said.split(f"\n| {title} | ")[1].splitlines()
        cells = next(line for line in lines if line.startswith("| dark+thick | ")).split(" | ")[1:]
        row[title] = {
            name.strip(" |"): float(cell.split()[0]) for name, cell in zip(head.split(" | "), cells, strict=True)
        }
    errors, more = row.values()
    assert set(more) == set(errors) - {"the truth", "this adapter, trained on pairs"}
    for method, value in more.items():
        assert value == pytest.approx(errors[method] - errors["this adapter, trained on pairs"], abs=0.0021)
    monkeypatch.setattr(counterfactual_benchmark, "edits_of", None)
    counterfactual_benchmark.main()
    assert said.endswith(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--num_inference_steps=5"])
    with pytest.raises(SystemExit, match=r"settings.json was made with .*'num_inference_steps': 4"):
        counterfactual_benchmark.main()
