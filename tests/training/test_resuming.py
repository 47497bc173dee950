"""What a resumed run may change, and what it may not."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.data import from_dataset
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train

from .small import adapter_weights, settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def given(pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data")
    changes = {"max_train_steps": 2, "checkpointing_steps": 1, "lr_scheduler": "cosine"}
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", **changes)
    train(TrainingArguments(**given))
    return given | {"resume_from_checkpoint": "latest"}


def learning_rates(folder):
    (group,) = torch.load(folder / "optimizer.bin", weights_only=True)["param_groups"]
    return group["initial_lr"], group["lr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seed": 1},
            "checkpoint-2 belongs to a run with other settings .--seed: 0 then, 1 now.. Resume with the same",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "--train_batch_size x --gradient_accumulation_steps x processes: '3 x 1 x 1' then, '3 x 2 x 1'",
        ),
        ({"use_ema": True}, "--use_ema: False then, True now"),
        ({"concepts": ["thick", "slant"]}, "--concepts: None then, .'thick', 'slant'. now"),
        ({"concept_rank": 2}, "--concept_rank: 4 then, 2 now"),
        ({"max_train_steps": 1}, "checkpoint-2 has 2 steps behind it, and the run is to have 1 .--max_train_steps"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint=checkpoint-7 is not a checkpoint"),
    ],
)
def test_another_run_is_refused_before_the_base_and_the_data_are_read(given, changes, message, tmp_path, capsys):
    before = (tmp_path / "out" / "training_arguments.json").read_bytes()
    shutil.rmtree(tmp_path / "data")
    capsys.readouterr()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(TrainingArguments(**given | changes))
    assert (tmp_path / "out" / "training_arguments.json").read_bytes() == before
    assert capsys.readouterr().out == ""


def test_concepts_that_the_data_names_otherwise_are_another_run(given, tmp_path, capsys):
    (tmp_path / "data" / "slant").rename(tmp_path / "data" / "tall")
    capsys.readouterr()
    with pytest.raises(ValueError, match="concepts: .'slant', 'thick'. then, .'tall', 'thick'. now"):
        train(TrainingArguments(**given))
    assert "The base" not in capsys.readouterr().out


def test_what_belongs_to_an_earlier_adapter_is_not_taken_for_the_new_ones(given, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (out / "results.md").write_text("of an earlier adapter")
    train(TrainingArguments(**given))  # is finished: nothing is learned
    assert "of an earlier adapter" in (out / "README.md").read_text()
    for name in ("evaluation/report.json", "evaluation/report.png", "samples/step-000001.png"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    capsys.readouterr()
    train(TrainingArguments(**given | {"max_train_steps": 3}))
    assert f"What belongs to an earlier adapter in {out}, such as report.json, is now in" in capsys.readouterr().out
    moved = sorted(str(path.relative_to(out / "earlier-1")) for path in (out / "earlier-1").rglob("*.*"))
    assert moved == ["evaluation/report.json", "evaluation/report.png", "results.md"]
    assert "of an earlier adapter" not in (out / "README.md").read_text()
    assert json.loads((out / "card.json").read_text())["grid"] == "samples/step-000001.png"  # it is the same run
    for checkpoint in checkpoint_steps(out).values():
        shutil.rmtree(checkpoint)
    monkeypatch.setattr("hf_causal_context.training.recipe.report_gap", lambda *args: None)
    train(TrainingArguments(**given))  # anew
    assert json.loads((out / "card.json").read_text())["grid"] is None
    assert not (out / "base_gap.json").exists()
    assert sorted(path.name for path in (out / "earlier-2").rglob("*.*")) == ["base_gap.json", "step-000001.png"]


def test_length_and_learning_rate_may_change(given, tmp_path):
    train(TrainingArguments(**given | {"max_train_steps": 4, "learning_rate": 1e-3, "lr_scheduler": "cosine"}))
    peak, rate = learning_rates(tmp_path / "out" / "checkpoint-3")
    assert peak == 1e-3
    assert rate == pytest.approx(1e-3 * 0.1464, rel=1e-3)  # cosine, three quarters of the way
    stored = json.loads((tmp_path / "out" / "training_arguments.json").read_text())
    assert stored["learning_rate"] == 1e-3


def test_fewer_epochs_than_a_run_has_done_are_refused(given, tmp_path):
    epochs = {"max_train_steps": None, "num_train_epochs": 1, "train_batch_size": 3, "observational_steps": 0}
    shorter = write_folders(tmp_path / "less", images=1)
    before = adapter_weights(tmp_path / "out")
    with pytest.raises(ValueError, match="checkpoint-2 has 2 steps behind it, and the run is to have 1 "):
        train(TrainingArguments(**given | epochs | {"train_data_dir": str(shorter)}))
    assert all(torch.equal(value, before[name]) for name, value in adapter_weights(tmp_path / "out").items())


def test_what_came_after_the_checkpoint_is_given_up(given, tmp_path):
    train(TrainingArguments(**given | {"max_train_steps": 4}))
    out = tmp_path / "out"
    assert list(checkpoint_steps(out)) == [1, 2, 3, 4]
    again = {"max_train_steps": 2, "resume_from_checkpoint": "checkpoint-1"}
    train(TrainingArguments(**given | again))
    assert list(checkpoint_steps(out)) == [1, 2]
    assert not list(out.glob(".*"))


def test_a_folder_with_checkpoints_of_its_own_does_not_go_on_from_those_of_another(given, tmp_path):
    elsewhere = {
        "output_dir": str(tmp_path / "other"),
        "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1"),
    }
    train(TrainingArguments(**given | elsewhere | {"max_train_steps": 3}))
    assert list(checkpoint_steps(tmp_path / "other")) == [2, 3]
    with pytest.raises(FileExistsError, match="holds checkpoints of another run"):
        train(TrainingArguments(**given | elsewhere))
    assert list(checkpoint_steps(tmp_path / "other")) == [2, 3]


def test_data_that_changed_since_the_run_began_is_told(given, tmp_path, capsys):
    def go_on(steps):
        capsys.readouterr()
        train(TrainingArguments(**given | {"max_train_steps": steps}))
        return capsys.readouterr().out

    assert "the data is not what" not in go_on(3)
    extra = tmp_path / "data" / "thick" / "extra.png"
    Image.new("RGB", (16, 16), "red").save(extra)
    then_now = "rows then: obs: 4, slant: 4, thick: 4; now: obs: 4, slant: 4, thick: 5"
    assert f"Warning: the data is not what this run was trained on until now ({then_now}). It goes on" in go_on(4)
    Image.new("RGB", (16, 16), "blue").save(extra)
    assert "(as many rows, but others, or in another order)" in go_on(5)
    assert "the data is not what" not in go_on(6)


def test_a_base_with_label_dropout_resumes_bit_for_bit(pipeline_folder, tmp_path):
    root = write_folders(tmp_path / "data")
    files = sorted(root.rglob("*.png"))
    columns = {"image": [str(path) for path in files], "context": [path.parent.name for path in files]}
    columns["digit"] = [i % 5 for i in range(len(files))]
    rows = from_dataset(Dataset.from_dict(columns).cast_column("image", ImageFeature()))
    changes = {"class_column": "digit", "checkpointing_steps": 3, "max_train_steps": 6, "observational_steps": 1}
    given = settings(pipeline_folder("dit"), root, tmp_path / "whole", **changes)
    whole = adapter_weights(train(TrainingArguments(**given), data=rows))
    parts = given | {"output_dir": str(tmp_path / "parts"), "resume_from_checkpoint": "latest"}
    train(TrainingArguments(**parts | {"max_train_steps": 3}), data=rows)
    resumed = adapter_weights(train(TrainingArguments(**parts), data=rows))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    joined = given | {"output_dir": str(tmp_path / "joined"), "train_batch_size": 1, "gradient_accumulation_steps": 3}
    split = adapter_weights(train(TrainingArguments(**joined), data=rows))
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=1e-5)
