"""The loop waits for the device once in ten steps, or in a second; nothing is saved, lost or told wrong by that."""

import itertools
import sys
from collections import Counter

import pytest
import torch
from accelerate import Accelerator

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.training.loop import trainer
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.loop.trainer import TrainingDivergedError, fit
from hf_causal_context.training.optimization_arguments import OptimizationArguments

from ..adapter.small import adapted
from .run_tiny import Faults
from .small import settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")

QUICK, SLOW = 1e-3, 2.0  # seconds between two looks at the clock


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: train a tiny adapter for some steps -> the folder. `losses` may change the losses of a step."""

    def call(steps, seconds=QUICK, losses=lambda step, losses: losses, validate=None, **changes):
        monkeypatch.setattr(trainer, "perf_counter", itertools.count(0.0, seconds).__next__)
        given = {"output_dir": str(tmp_path / "out"), "max_train_steps": steps, "checkpointing_steps": 1_000}
        arguments = OptimizationArguments(**given | changes)
        numbers, generator = itertools.count(1), torch.Generator().manual_seed(0)

        def objective(model, batch):
            return losses(next(numbers), model(batch, context=["thick", ()]).square().mean(1))

        batches = lambda first: (torch.randn(2, 10, generator=generator) for _ in itertools.count())  # noqa: E731
        return fit(make_accelerator(arguments), adapted(), objective, batches, arguments, steps, validate)

    return call


@pytest.fixture
def waits(monkeypatch):
    """How often the host has read a tensor, and processes have communicated.

    AdamW's own reading is left out: on a GPU it is one kernel, which reads nothing.
    """
    counted = Counter()

    def count(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            counted[name] += not sys._getframe(1).f_globals["__name__"].startswith("torch.optim")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        count(torch.Tensor, name)
    for name in ("reduce", "gather", "check_trigger", "wait_for_everyone"):
        count(Accelerator, name)
    return counted


@pytest.fixture
def logged(monkeypatch):
    """(step, values) of everything that trackers are told."""
    told = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: told.append((step, values)))
    return told


@pytest.mark.parametrize(("seconds", "expected"), [(QUICK, 4), (SLOW, 40)], ids=["quick steps", "slow steps"])
def test_the_host_waits_once_in_ten_steps_or_in_a_second(seconds, expected, run, waits, tmp_path):
    run(22, seconds, output_dir=str(tmp_path / "short"))
    short = waits.copy()
    waits.clear()
    run(62, seconds, output_dir=str(tmp_path / "long"))
    waits.subtract(short)
    assert +waits == {"reduce": expected, "tolist": expected}


def test_processes_communicate_once_in_ten_steps(together, pipeline_folder, tmp_path):
    path = tmp_path / "collectives"
    data = write_folders(tmp_path / "data")
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", train_batch_size=1, max_train_steps=23)
    runs = together(given, 2, {0: Faults(collectives_file=str(path)), 1: Faults(collectives_file=str(path) + "-1")})
    assert [run.wait() for run in runs] == [given["output_dir"]] * 2
    # After steps 1, 2, 12, 22 and 23: of each step since the last time its loss, and of three contexts the sum of the
    # losses and their number; and two numbers more.
    assert path.read_text().split() == ["9", "9", "72", "72", "9"]


def test_every_step_is_logged_with_its_own_values(run, logged, tmp_path):
    changes = {"lr_warmup_steps": 5, "lr_scheduler": "cosine", "use_ema": True}
    quick = run(25, QUICK, output_dir=str(tmp_path / "quick"), **changes)
    late = logged.copy()
    logged.clear()
    slow = run(25, SLOW, output_dir=str(tmp_path / "slow"), **changes)
    assert [step for step, _ in logged] == list(range(1, 26))
    assert late == logged
    assert len({values["loss"] for _, values in logged}) == len({values["learning_rate"] for _, values in logged}) == 25
    for name in ("adapter_model.safetensors", "checkpoint-25/optimizer.bin"):
        assert (quick / name).read_bytes() == (slow / name).read_bytes()


def not_finite(at):
    return lambda step, losses: losses * float("nan") if step == at else losses


class TestDivergence:
    """Steps are looked at after 1, 2, 12, 20, 24, 34 and 40 of them."""

    @pytest.mark.parametrize("at", [1, 2, 3, 5, 12, 19, 20, 23, 24, 25, 40])
    def test_nothing_is_saved_or_validated_after_it(self, at, run, logged, tmp_path):
        validated = []
        with pytest.raises(TrainingDivergedError, match=rf"The loss became nan at step {at} \(.*Nothing was saved"):
            run(40, losses=not_finite(at), validate=validated.append, checkpointing_steps=20, validation_steps=24)
        assert list(checkpoint_steps(tmp_path / "out")) == ([20] if at > 20 else [])
        assert validated == ([24] if at > 24 else [])
        assert not list((tmp_path / "out").glob("*.safetensors"))
        assert [step for step, _ in logged] == list(range(1, at))

    def test_it_is_named_rather_than_what_follows_from_it(self, run):
        def refuse(step, losses):
            if step == 6:
                raise ValueError("no probabilities")
            return not_finite(5)(step, losses)

        with pytest.raises(TrainingDivergedError, match="The loss became nan at step 5"):
            run(40, losses=refuse)


def test_an_error_does_not_lose_what_was_to_be_logged(run, logged):
    def refuse(step, losses):
        if step == 6:
            raise ValueError("shapes cannot be multiplied")
        return losses

    with pytest.raises(ValueError, match="shapes cannot be multiplied"):
        run(40, losses=refuse)
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
