"""Trackers that raise: the training goes on as if there were none, and says so once."""

import re

import pytest
from accelerate.tracking import TensorBoardTracker

from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train

from ..training.small import adapter_weights, settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def given(pipeline_folder, tmp_path):
    changes = {"max_train_steps": 5, "checkpointing_steps": 2, "validation_steps": 2, "report_to": "tensorboard"}
    changes |= {"num_validation_images": 1, "num_inference_steps": 1}
    return settings(pipeline_folder("ddpm"), write_folders(tmp_path / "data"), tmp_path / "out", **changes)


def lose_connection(*args, **kwargs):
    raise ConnectionError("no route to host")


def fail_from(step):
    """A tracker's `log` whose server is gone from a step on."""
    log = TensorBoardTracker.log

    def fail(self, values, step_given=None, **kwargs):
        number = kwargs.pop("step", step_given)
        return lose_connection() if number >= step else log(self, values, number, **kwargs)

    return fail


@pytest.mark.parametrize(
    ("method", "replacement", "consequence", "last"),
    [
        ("log", fail_from(3), "what it shows will be incomplete", "The last complete checkpoint is .*/checkpoint-2"),
        ("log_images", lose_connection, "what it shows will be incomplete", "There is no checkpoint yet"),  # of step 0
        ("finish", lose_connection, "what it shows will be incomplete", "The last complete .* is .*/checkpoint-5"),
        ("start", lose_connection, "nothing will be logged", "There is no checkpoint yet"),
        ("store_init_configuration", lose_connection, "nothing will be logged", "There is no checkpoint yet"),
        ("__init__", lose_connection, "nothing will be logged", "There is no checkpoint yet"),
    ],
)
def test_a_tracker_that_fails_is_said_once(
    method, replacement, consequence, last, given, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(TensorBoardTracker, method, replacement)
    folder = train(TrainingArguments(**given))
    said = capsys.readouterr().out
    assert said.count("no route to host") == said.count("The tracker tensorboard failed") == 1
    expected = (
        rf"The tracker tensorboard failed \(ConnectionError: no route to host\). Training goes on; {consequence}. "
        rf"{last}.* Mend its connection or disk for the next run, or leave --report_to out"
    )
    assert re.search(expected, said)
    assert (folder / "README.md").exists()
    plain = given | {"output_dir": str(tmp_path / "plain"), "report_to": None}
    train(TrainingArguments(**plain))
    expected = adapter_weights(plain["output_dir"])
    assert all(tensor.equal(expected[name]) for name, tensor in adapter_weights(folder).items())
