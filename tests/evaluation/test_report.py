"""The files of a report."""

import json
import sys

import pytest
import torch
from PIL import Image

from hf_causal_context._markdown import table
from hf_causal_context.evaluation import classifiers, metrics
from hf_causal_context.evaluation import report as report_module
from hf_causal_context.evaluation.evaluator import evaluate_samples
from hf_causal_context.evaluation.readings import Reader
from hf_causal_context.evaluation.report import samples_grid, write_report
from hf_causal_context.messages.installation import installation

from .small import CONCEPTS, OBS, PAIR, A, B, draw, report


@pytest.fixture(autouse=True, scope="module")
def _rough_and_fast():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "NUM_PROJECTIONS", 20)
        patch.setattr(classifiers, "_MIN_STEPS", 20)
        yield


@pytest.fixture(scope="module")
def found():
    curve = {s: draw(20, {"a": s}, seed=101) for s in (0.0, 0.5, 1.0)}
    return report(strength_samples={"a": curve})


def test_all_files_are_written_and_agree(found, tmp_path):
    paths = write_report(found, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.png"], "vectors make no grid"
    assert sorted(path.name for path in paths) == sorted(path.name for path in paths[0].parent.iterdir())
    values = json.loads(paths[0].read_text())
    assert values == json.loads(json.dumps(found.to_dict()))
    pair = next(context for context in values["contexts"] if context["context"] == "a+b")
    text = paths[1].read_text()
    assert f"| a+b | held out | {pair['distance']['samples']['mean']:.4f} ± " in text
    assert f"| do(a) | {values['leakage']['samples'][0][0]:+.2f} / {values['leakage']['data'][0][0]:+.2f} |" in text
    image = Image.open(paths[2])
    assert image.width > 1000
    assert len(image.convert("RGB").getcolors(10**6)) > 50


def test_names_do_not_end_the_cells_of_tables():
    lines = list(table(("do(a|b)", r"c\|d"), [("a|b", "1")]))
    assert lines == [r"| do(a\|b) | c\|d |", "|---|---|", r"| a\|b | 1 |"]


def test_json_holds_null_where_nothing_could_be_measured(tmp_path):
    unreadable = report(attributes=lambda rows: torch.full((len(rows), 1), torch.nan), attribute_names=("a",))
    values = json.loads(write_report(unreadable, tmp_path)[0].read_text())
    assert values["contexts"][0]["attributes"] == {"a": None}
    assert values["contexts"][0]["attribute_distance"] is None


def test_without_matplotlib_the_rest_is_written(found, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("report.png", "samples.png"):  # of an earlier report, of images
        (tmp_path / name).write_text("earlier")
    assert [path.name for path in write_report(found, tmp_path)] == ["report.json", "report.md"]
    assert f"No report.png: Plots need matplotlib: {installation('plot')}\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}


def test_a_failure_leaves_the_earlier_report(found, tmp_path, monkeypatch):
    (tmp_path / "report.md").write_text("earlier")

    def fail(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(report_module, "markdown", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(found, tmp_path)
    assert (tmp_path / "report.md").read_text() == "earlier"
    assert not list(tmp_path.glob(".unfinished*"))


def test_the_grid_shows_real_images_beside_samples():
    contexts = (OBS, A, B, PAIR)
    levels = {context: 0.2 * n for n, context in enumerate(contexts)}
    noise = torch.rand(20, 1, 8, 8) / 100
    real = {context: noise + level for context, level in levels.items() if context != PAIR}
    samples = {context: [noise + level + 0.1] for context, level in levels.items()}
    found = evaluate_samples(CONCEPTS, real, samples, samples[OBS])
    grid = samples_grid(found)
    # the middles of the first real image and of the last sample of every row
    width, height = grid.size
    pitch = 68
    rows = [height - (len(contexts) - n) * pitch + pitch // 2 for n in range(len(contexts))]
    last_samples = [grid.getpixel((width - pitch // 2, y))[0] / 255 for y in rows]
    assert last_samples == pytest.approx([0.1, 0.3, 0.5, 0.7], abs=0.02)
    last_real = [grid.getpixel((width - 8 * pitch - pitch // 2 - 12, y))[0] / 255 for y in rows]
    assert last_real[:3] == pytest.approx([0.0, 0.2, 0.4], abs=0.02)
    assert last_real[3] == 1, "no real images: white"


def test_images_above_64_pixels_are_measured_small_and_shown_whole():
    images = torch.rand(12, 3, 96, 80)
    read = Reader()(images, "Images")
    assert read.values.shape == (12, 3, 64, 53)
    torch.testing.assert_close(read.values.mean(), images.mean(), rtol=0.01, atol=0)
    assert torch.equal(read.examples, images[:8])
    small = torch.rand(12, 3, 64, 40)
    assert torch.equal(Reader()(small, "Images").values, small)
