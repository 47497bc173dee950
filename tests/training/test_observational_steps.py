"""A run begins with the observational set alone, and goes on as it began."""

import json

import pytest
import torch

from hf_causal_context._files import ARGUMENTS
from hf_causal_context.training.arguments import TextArguments, TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.observational import observational_samples, settle_observational_steps

from .small import adapter_weights, settings, write_folders


def given(tmp_path, **changes):
    return TrainingArguments(pretrained_model_name_or_path="base", output_dir=str(tmp_path), **changes)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 20), ({"observational_steps": 7}, 7), ({"observational_steps": 0}, 0), ({"observational_rank": 0}, 0)],
)
def test_a_fifth_of_the_run_unless_there_is_no_part_or_another_number_is_given(tmp_path, changes, steps):
    settled = settle_observational_steps(given(tmp_path, **changes), 100)
    assert settled.observational_steps == steps
    batched = settle_observational_steps(
        given(tmp_path, train_batch_size=3, gradient_accumulation_steps=2, **changes), 100
    )
    assert observational_samples(batched, num_processes=4) == steps * 24


def test_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="obs=0 leaves out the observational set, so the observational part could not"):
        settle_observational_steps(given(tmp_path, context_weights=["obs=0"]), 100)
    without = settle_observational_steps(given(tmp_path, context_weights=["obs=0"], observational_rank=0), 100)
    assert without.observational_steps == 0
    with pytest.raises(ValueError, match="--observational_steps=9 of 9 steps leave none for the concepts"):
        settle_observational_steps(given(tmp_path, observational_steps=9), 9)
    for arguments in (TrainingArguments, TextArguments):
        with pytest.raises(ValueError, match="--observational_steps=3 would train nothing"):
            arguments(pretrained_model_name_or_path="base", output_dir="x", observational_rank=0, observational_steps=3)


def test_a_resumed_run_goes_on_as_it_began(tmp_path):
    resumed = given(tmp_path, resume_from_checkpoint="latest")
    assert settle_observational_steps(resumed, 100).observational_steps == 20  # there is nothing to resume yet
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / ARGUMENTS).write_text(json.dumps({"observational_steps": 5}))
    assert settle_observational_steps(resumed, 100).observational_steps == 5
    (tmp_path / ARGUMENTS).write_text("{}")  # of a run that is older than the argument
    assert settle_observational_steps(resumed, 100).observational_steps == 0


def test_concepts_are_untouched_while_the_run_is_observational(pipeline_folder, tmp_path):
    root = write_folders(tmp_path / "data")
    changes = {"max_train_steps": 3, "observational_steps": 2, "checkpointing_steps": 2, "adam_weight_decay": 0.0}
    folder = train(TrainingArguments(**settings(pipeline_folder("ddpm"), root, tmp_path / "out", **changes)))
    assert json.loads((folder / ARGUMENTS).read_text())["observational_steps"] == 2
    early, late = (adapter_weights(path) for path in (folder / "checkpoint-2", folder))
    ups = [name for name in late if name.endswith("causal_context_up.weight")]
    assert ups
    for name in ups:
        assert early[name][:, :16].any(), "the observational part is trained"
        assert not early[name][:, 16:].any()
        assert late[name][:, 16:].any()
        assert not torch.equal(late[name][:, :16], early[name][:, :16])


def test_a_run_that_is_older_than_the_part_goes_on_without_one(pipeline_folder, tmp_path):
    root = write_folders(tmp_path / "data")
    options = settings(pipeline_folder("ddpm"), root, tmp_path / "out", max_train_steps=2, checkpointing_steps=1)
    train(TrainingArguments(**options | {"max_train_steps": 1, "observational_rank": 0}))
    for path in tmp_path.glob("out/**/" + ARGUMENTS):  # as that version wrote them
        stored = json.loads(path.read_text())
        del stored["observational_rank"], stored["observational_steps"]
        path.write_text(json.dumps(stored))
    again = options | {"resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="--observational_rank: 0 then, None now"):
        train(TrainingArguments(**again))
    train(TrainingArguments(**again, observational_rank=0))
