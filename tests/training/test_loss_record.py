"""The losses of a training by context: sums without synchronization, kept, gone on with, and drawn."""

import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_causal_context.contexts import ConceptSet
from hf_causal_context.messages.progress import ProgressBar
from hf_causal_context.training.arguments import OptimizationArguments, TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop.early_stopping import EarlyStopping
from hf_causal_context.training.loop.loss_image import loss_image
from hf_causal_context.training.loop.loss_record import IMAGE, LOSSES, LossRecord, kinds_of_contexts
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.loop.trainer import TrainingDivergedError, fit

from ..adapter.small import adapted
from .small import settings, write_folders

CPU = torch.device("cpu")
CONCEPTS = ConceptSet(("a", "b"))


def test_contexts_that_differ_in_strength_are_of_one_kind():
    kinds = kinds_of_contexts(CONCEPTS, ["", "a", "a=0.5", "a=0.5,b=-1"], "plain")
    assert {name: mask.tolist() for name, mask in kinds.items()} == {
        "plain": [False, False],
        "a": [True, False],
        "a+b": [True, True],
    }


def test_losses_are_averaged_by_kind_of_context():
    record = LossRecord(kinds_of_contexts(CONCEPTS, ["", "a", "b"], "obs"), 400, 2, CPU)
    masks = torch.tensor([[0, 0], [0.5, 0], [1, 0], [1, 1]])  # the last one is of no kind that was named
    record.add(0, masks, torch.tensor([1.0, 2.0, 4.0, 100.0]))
    assert record.note(1, 0.1, record.sums[0].numpy()) == {"obs": 1, "a": 3}
    record.add(1, masks[:2], torch.tensor([3.0, 8.0]))
    means = record.note(2, 0.2, record.sums[1].numpy())
    assert means == pytest.approx({"obs": (0.95 + 3) / 1.95, "a": (0.95 * 6 + 8) / (0.95 * 2 + 1)})


def test_what_is_kept_are_means_over_equal_numbers_of_steps(tmp_path):
    kinds = kinds_of_contexts(CONCEPTS, ["", "a"], "obs")
    record = LossRecord(kinds, 400, 1, CPU)
    for step in range(1, 8):
        record.sums.zero_()
        record.add(0, torch.tensor([[0, 0]]), torch.tensor([float(step)]))
        record.note(step, step / 10, record.sums[0].numpy())
    record.save(tmp_path, 7)
    points = json.loads((tmp_path / LOSSES).read_text())["points"]
    assert [(point["step"], point["losses"]) for point in points] == [(n, {"obs": n - 0.5}) for n in (2, 4, 6)]
    assert [point["learning_rate"] for point in points] == [0.2, 0.4, 0.6]
    again = LossRecord(kinds, 400, 1, CPU)
    again.load(tmp_path, 5)
    noted(again, 6)
    again.save(tmp_path / "again", 6)
    assert json.loads((tmp_path / "again" / LOSSES).read_text())["points"][:2] == points[:2]


def noted(record, step):
    record.sums.zero_()
    record.add(0, torch.tensor([[0, 0], [1, 0]]), torch.tensor([float(step), 1.0 / step]))
    return record.note(step, step / 10, record.sums[0].numpy())


@pytest.mark.parametrize("ended", [3, 5])  # when the run was given up: at its checkpoint, or later
def test_a_resumed_run_goes_on_with_its_running_means_and_the_point_it_was_at(ended, tmp_path):
    kinds = kinds_of_contexts(CONCEPTS, ["", "a"], "obs")
    whole, cut, resumed = (LossRecord(kinds, 800, 1, CPU) for _ in range(3))
    means = [noted(whole, step) for step in range(1, 9)]
    (tmp_path / "checkpoint-3").mkdir()  # between the points of steps 0 and 4
    for step in range(1, ended + 1):
        noted(cut, step)
        if step in (3, ended):
            cut.save(tmp_path, step)
    assert json.loads((tmp_path / LOSSES).read_text())["sums"].keys() == {"3"}
    resumed.load(tmp_path, 3)
    assert [noted(resumed, step) for step in range(4, 9)] == means[3:]
    for record, folder in ((whole, tmp_path / "whole"), (resumed, tmp_path / "resumed")):
        record.save(folder, 8)
    points = [json.loads((tmp_path / name / LOSSES).read_text())["points"] for name in ("whole", "resumed")]
    assert points[0] == points[1]
    assert [point["step"] for point in points[0]] == [4, 8]


def test_curves_of_runs_that_kept_no_sums_and_of_other_contexts_go_on(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    points = [{"step": 1, "learning_rate": 0.1, "losses": {"obs": 1.0}}]
    (tmp_path / LOSSES).write_text(json.dumps(points))
    old = LossRecord(kinds_of_contexts(CONCEPTS, ["", "a"], "obs"), 200, 1, CPU)
    old.load(tmp_path, 1)
    noted(old, 2)
    old.save(tmp_path, 1)
    other = LossRecord(kinds_of_contexts(CONCEPTS, ["", "b"], "obs"), 200, 1, CPU)
    other.load(tmp_path, 1)
    assert noted(other, 2) == {"obs": pytest.approx(2.0)}


def test_the_image_has_a_curve_for_every_context_in_a_color_of_its_own():
    names = ["obs", "a", "b", "a+b"]
    points = [
        {"step": step, "learning_rate": 1e-3 / step, "losses": {name: i + 1 / step for i, name in enumerate(names)}}
        for step in range(10, 110, 10)
    ]
    colors, counts = np.unique(np.asarray(loss_image(names, points)).reshape(-1, 3), axis=0, return_counts=True)
    vivid = counts[np.ptp(colors.astype(int), axis=1) > 100]
    assert (vivid > 500).sum() == 4
    one = [{"step": 1, "learning_rate": 0.0, "losses": {"obs": 0.0}}]
    assert loss_image(["obs", "a"], one).size == loss_image(["obs", "a"], points).size


@pytest.mark.usefixtures("on_cpu")
def test_the_bar_tells_concepts_called_loss_and_lr_from_its_own_numbers(pipeline_folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(ProgressBar, "set_postfix", lambda self, values, **how: shown.append(values))
    data = write_folders(tmp_path / "data", contexts=("obs", "loss", "lr"))
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", max_train_steps=2, observational_steps=0)
    train(TrainingArguments(**given))
    assert shown[-1].keys() == {"loss", "loss/obs", "loss/loss", "loss/lr", "lr"}
    assert shown[-1]["lr"] == 1e-2


@pytest.mark.usefixtures("on_cpu")
def test_a_run_leaves_curves_and_the_base_beside_its_samples(pipeline_folder, tmp_path, capsys):
    data = write_folders(tmp_path / "data", contexts=("obs", "slant", "thick"))
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", max_train_steps=2, num_validation_images=2)
    train(TrainingArguments(**given, num_inference_steps=2))
    folder = tmp_path / "out"
    points = json.loads((folder / LOSSES).read_text())["points"]
    assert [point["step"] for point in points] == [1, 2]
    assert set().union(*(point["losses"] for point in points)) == {"obs", "slant", "thick"}
    assert Image.open(folder / IMAGE).size[0] == 900
    begin, end = (np.asarray(Image.open(folder / "samples" / f"step-00000{step}.png")) for step in (0, 2))
    assert len(begin) < len(end) / 3  # the base alone, as every context is then
    rows = len(begin) - 8
    np.testing.assert_array_equal(begin[:rows, -100:], end[:rows, -100:])  # labels differ in width
    assert "obs=" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("ending", ["early stopping", "divergence", "an error"])
def test_curves_are_drawn_however_a_run_ends(ending, tmp_path):
    steps = itertools.count(1)

    def objective(model, batch):
        step = next(steps)
        if step == 5 and ending == "an error":
            raise ValueError("no probabilities")
        return model(batch.x, context=batch.context).square().mean(1) * (float("nan") if step == 5 else 1)

    def batches(first):
        return (SimpleNamespace(x=torch.ones(2, 10), context=torch.eye(2, 3)) for _ in itertools.count())

    stops = {"validation_steps": 4} if ending == "early stopping" else {}
    arguments = OptimizationArguments(output_dir=str(tmp_path), max_train_steps=400, **stops)
    expected = {"early stopping": nullcontext(), "divergence": pytest.raises(TrainingDivergedError)}
    stopping = EarlyStopping(patience=1, min_delta=0.0)
    stopping.should_stop(0.0)
    with expected.get(ending, pytest.raises(ValueError, match="no probabilities")):
        kinds = {"thick": torch.tensor([True, False, False])}
        accelerator, validate = make_accelerator(arguments), lambda step: 1.0
        fit(accelerator, adapted(), objective, batches, arguments, 400, validate, stopping, kinds=kinds)
    assert [point["step"] for point in json.loads((tmp_path / LOSSES).read_text())["points"]] == [2, 4]
    assert (tmp_path / IMAGE).exists()
