"""Calibrations: what a report makes of curves, what it refuses, and the command that stores them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hf_causal_context.adapter.calibration import check_calibration
from hf_causal_context.cli import main
from hf_causal_context.evaluation import evaluator
from hf_causal_context.evaluation.calibrating import calibrations
from hf_causal_context.evaluation.sampling import STRENGTHS
from hf_causal_context.inference.adapted import StoredAdapter

from ..training.conftest import pipeline_folder  # noqa: F401 (a fixture)
from .small import draw, real_rows, report, right_samples
from .test_command import _rough_and_fast, adapter, base_folder, command, store, write_images  # noqa: F401 (fixtures)
from .test_response import curve, response_to, root


@pytest.mark.parametrize("shape", [root, lambda s: s**2, lambda s: min(s, 1.1)])
def test_equal_steps_of_the_dial_are_equal_changes(shape):
    found, problems = calibrations(response_to(shape)[0])
    assert problems == []
    dials = [dial for dial, _ in found["a"]]
    strengths = [strength for _, strength in found["a"]]
    assert dials == pytest.approx([shape(s) / shape(1) for s in strengths], abs=1e-3)
    assert {0, 0.25, 0.5, 0.75, 1} <= set(strengths)


def test_strengths_that_go_equally_far_when_rounded_make_one_knot():
    shape = {0.25: 0.00001, 0.5: 0.50001, 0.75: 0.50002, 1.25: 1.00001}
    found, _ = calibrations(response_to(lambda s: shape.get(s, s))[0])
    assert found == {"a": [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]}
    check_calibration(found, ["a"])


def test_there_are_never_more_knots_than_a_config_holds():
    found, _ = response_to(lambda s: s)
    (straight,) = found.strength_curves
    strengths = tuple(i / 149 for i in range(150)) + tuple(1 + i / 100 for i in range(1, 51))
    many = replace(straight, strengths=strengths, response=replace(straight.response, samples=strengths))
    knots = calibrations(replace(found, strength_curves=(many,)))[0]["a"]
    check_calibration({"a": knots}, ["a"])
    assert (len(knots), knots[-1]) == (53, (1.5, 1.5))


def test_what_cannot_be_calibrated_says_why():
    samples = right_samples()
    bent = {"a": curve(lambda s: s if s != 0.75 else 0.3), "b": {s: draw(60, {"b": s}, seed=101) for s in STRENGTHS}}
    found, problems = calibrations(report(samples, strength_samples=bent))
    assert list(found) == ["b"]
    (problem,) = problems
    assert problem.startswith("'a' is not monotone: its effect falls at 0.75")
    assert "'a=0.5'" in problem
    with pytest.raises(ValueError, match="No calibration was stored. 'a' has an effect too small"):
        calibrations(response_to(lambda s: 0.0)[0])
    few = report(samples, strength_samples={"a": curve(lambda s: s, num=30)})
    with pytest.raises(ValueError, match="'a' was measured on 30 samples at each strength and 200 real rows; .* 50"):
        calibrations(few)
    with pytest.raises(ValueError, match="on 60 samples at each strength and 40 real rows"):
        calibrations(response_to(lambda s: s, real_rows(40))[0])


def test_advice_names_what_there_is_too_little_of():
    with pytest.raises(ValueError, match="a calibration needs 50 of both: raise --num_samples[.]$"):
        calibrations(report(right_samples(), strength_samples={"a": curve(lambda s: s, num=30)}))
    with pytest.raises(ValueError, match="a calibration needs 50 of both: add rows[.]$"):
        calibrations(response_to(lambda s: s, real_rows(40))[0])


@pytest.mark.parametrize("counts", [{"obs": 12, "thick": 60, "slant": 60}, {"obs": 60, "thick": 49, "slant": 12}])
def test_too_few_rows_to_calibrate_anything_are_refused_before_the_base_is_loaded(
    counts,
    adapter,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    images = write_images(tmp_path / "images", counts)
    arguments = [*command(adapter, images, tmp_path / "out"), "--calibrate", "--num_samples=50"]
    monkeypatch.setattr(StoredAdapter, "pipeline", None)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    obs, thick, slant = counts.values()
    assert "--calibrate needs 50 rows without intervention, and as many of a concept alone." in said
    assert f"There are {obs} without intervention, {slant} of 'slant', {thick} of 'thick'. Add rows" in said


def test_too_few_texts_to_calibrate_are_refused_before_the_base_is_loaded(tmp_path, capsys, monkeypatch):
    for name in ("obs", "loud"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "texts.txt").write_text("a cat\nthe dog\n")
    config = SimpleNamespace(concepts=("loud",))
    stored = SimpleNamespace(is_of_language_model=True, config=config)
    monkeypatch.setattr(StoredAdapter, "open", lambda *args, **options: stored)
    places = [f"--adapter={tmp_path}", f"--train_data_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}"]
    assert main(["evaluate", *places, "--calibrate"]) == 1
    assert "There are 2 without intervention, 2 of 'loud'. Add rows" in capsys.readouterr().err


def drawn(base, jobs, **options):
    """Images that are brighter on the left for thick, by its square, and at the top for slant, as far as 1."""
    for context, seed in jobs:
        image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) / 4
        image[..., :8] += 0.3 * context.strengths.get("thick", 0.0) ** 2
        image[..., :8, :] += 0.3 * (s if (s := context.strengths.get("slant", 0.0)) <= 1 else 0.5)
        yield image


def test_the_command_evaluates_at_strengths_of_the_data_and_calibrates(adapter, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluator, "generate_jobs", drawn)
    images = write_images(tmp_path / "images", {"obs": 60, "thick": 60, "thick=0.5": 12, "slant": 60})
    arguments = [*command(adapter, images, tmp_path / "out"), "--calibrate", "--contexts", "thick=0.5"]
    assert main(arguments) == 1
    assert "--num_samples=3 must be at least 50 for --calibrate" in capsys.readouterr().err
    assert main([*arguments, "--num_samples=50", "--num_seeds=1", "--batch_size=50"]) == 0
    printed = capsys.readouterr().out
    thick, slant = json.loads((tmp_path / "out" / "report.json").read_text())["strength_curves"]
    assert thick["response"]["samples"] == pytest.approx([s**2 for s in STRENGTHS], abs=1e-5)
    truth = thick["response"]["truth"]
    assert [value is not None for value in truth] == [s in (0, 0.5, 1) for s in STRENGTHS]
    assert truth[2] == pytest.approx(1, abs=0.2), "half the strength is all of it in these images"
    assert slant["response"]["falls"] == [1.25]
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["calibration"]
    assert stored["thick"] == [pytest.approx([s**2, s], abs=1e-4) for s in STRENGTHS]
    assert stored["slant"] == [[s, s] for s in STRENGTHS if s <= 1], "no dial beyond where it falls"
    assert "Calibrated, and stored with the adapter" in printed
    assert "| thick | 0.00 -> 0, 0.06 -> 0.25, 0.25 -> 0.5, 0.56 -> 0.75, 1.00 -> 1, 1.56 -> 1.25" in printed


def test_an_adapter_of_the_hub_is_not_calibrated_in_place(tmp_path, capsys, monkeypatch):
    stored = SimpleNamespace(is_of_language_model=False)
    monkeypatch.setattr(StoredAdapter, "open", lambda *args, **options: stored)
    (tmp_path / "data").mkdir()
    arguments = ["--adapter=user/x", f"--train_data_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}"]
    assert main(["evaluate", *arguments, "--calibrate"]) == 1
    assert "user/x is on the Hub. Download it first" in capsys.readouterr().err
