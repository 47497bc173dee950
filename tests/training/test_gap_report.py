"""What a run says of its base: once, in one sentence, and without a trace in its result."""

import json
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_causal_context._files import BASE_GAP
from hf_causal_context.bases.gap import BaseGap
from hf_causal_context.training import finetune, recipe
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.gap_report import report_gap
from hf_causal_context.training.language import fine_tune as language
from hf_causal_context.training.language import train_text

from .small import adapter_weights, settings, write_folders
from .small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def run(pipeline_folder, tmp_path):
    """A function: name of a tiny pipeline, settings -> the output folder."""

    def call(name="ddpm", output_dir="out", **changes):
        root = tmp_path / "data"
        if not root.exists():
            write_folders(root, captions=name != "ddpm")
        return train(TrainingArguments(**settings(pipeline_folder(name), root, tmp_path / output_dir, **changes)))

    return call


@pytest.fixture
def run_text(tmp_path):
    def call(output_dir="out", shape="text", name="llama", **changes):
        given = arguments(tmp_path, output_dir=str(tmp_path / output_dir), **changes)
        data = text_data(shape, streaming=given.streaming)
        return train_text(given, language_model(name, dropout=True), word_tokenizer(), data)

    return call


def refuse(*args):
    raise AssertionError("measured again")


def without_measuring(monkeypatch):
    monkeypatch.setattr(recipe, "report_gap", lambda *args: None)


def assert_same_weights(one, other):
    one, other = adapter_weights(one), adapter_weights(other)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize(("name", "streaming"), [("ddpm", False), ("ddpm", True), ("stable_diffusion", False)])
def test_measuring_changes_no_bit_of_an_image_adapter(name, streaming, run, monkeypatch):
    changes = {"resolution": 16, "max_train_steps": 3, "streaming": streaming, "mechanism": "reduced"}
    measured = run(name, **changes)
    assert (measured / BASE_GAP).exists()
    without_measuring(monkeypatch)
    plain = run(name, "plain", **changes)
    assert not (plain / BASE_GAP).exists()
    assert_same_weights(measured, plain)


@pytest.mark.parametrize(
    ("name", "shape", "streaming"), [("llama", "text", False), ("gpt2", "chat", True), ("t5", "prompt", False)]
)
def test_measuring_changes_no_bit_of_a_text_adapter(name, shape, streaming, run_text, monkeypatch):
    changes = {"shape": shape, "name": name, "streaming": streaming, "max_train_steps": 3}
    measured = run_text(**changes)
    assert BaseGap.load(measured).content == "texts"
    without_measuring(monkeypatch)
    assert_same_weights(measured, run_text("plain", **changes))


def test_it_is_said_once_kept_and_shown_to_trackers(run, capsys):
    folder = run(report_to="tensorboard")
    said = [line for line in capsys.readouterr().out.splitlines() if "your observational set" in line]
    gap = BaseGap.load(folder)
    assert gap.rows == 4
    assert said == [gap.advice(None)]
    (events,) = (folder / "logs" / "hf_causal_context").glob("events.out.*")
    log = EventAccumulator(str(events)).Reload()
    (logged,) = log.Scalars("base_gap/times")
    assert logged.value == pytest.approx(gap.times)
    assert gap.note(4) in (folder / "README.md").read_text()


def test_without_an_observational_part_a_far_base_is_a_warning(run, capsys, monkeypatch):
    far = BaseGap("images", 0.3, 0.1, 4)
    monkeypatch.setattr(finetune, "denoiser_gap", lambda *args: far)
    folder = run(observational_rank=0)
    assert far.advice(0) in capsys.readouterr().out
    assert far.advice(0).startswith("WARNING")
    assert far.note(0) in (folder / "README.md").read_text()


@pytest.mark.parametrize("by_name", [False, True])
def test_a_resumed_run_says_what_it_measured_and_does_not_measure_again(by_name, run, capsys, monkeypatch, tmp_path):
    first = run(max_train_steps=2, checkpointing_steps=1)
    stored, said = (first / BASE_GAP).read_bytes(), capsys.readouterr().out
    monkeypatch.setattr(finetune, "denoiser_gap", refuse)
    resumed = {"output_dir": "other", "resume_from_checkpoint": str(first / "checkpoint-1")}
    again = run(max_train_steps=3, **(resumed if by_name else {"resume_from_checkpoint": "latest"}))
    assert (again / BASE_GAP).read_bytes() == stored
    sentence = BaseGap.load(first).advice(None)
    assert sentence in said
    assert sentence in capsys.readouterr().out


def test_a_resumed_text_run_does_not_measure_again(run_text, monkeypatch):
    stored = (run_text(checkpointing_steps=1) / BASE_GAP).read_bytes()
    monkeypatch.setattr(language, "text_gap", refuse)
    folder = run_text(resume_from_checkpoint="latest", max_train_steps=3)
    assert (folder / BASE_GAP).read_bytes() == stored


def test_what_a_run_without_checkpoints_left_behind_is_not_believed(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / BASE_GAP).write_text(BaseGap("images", 9.0, 9.0, 4).json())
    assert BaseGap.load(run(resume_from_checkpoint="latest")).on_set != 9


def test_the_folder_of_another_run_keeps_its_number(run, tmp_path):
    folder = run()
    before = (folder / BASE_GAP).read_bytes()
    with pytest.raises(FileExistsError, match="holds checkpoints of another run"):
        run(seed=1)
    assert (folder / BASE_GAP).read_bytes() == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no room")])
def test_lack_of_memory_is_said_and_the_run_goes_on(error, run, capsys, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(finetune, "denoiser_gap", fail)
    folder = run()
    expected = f"The base was not compared with your observational set (it ran out of memory: {error})."
    assert expected in capsys.readouterr().out
    assert not (folder / BASE_GAP).exists()
    assert (folder / "adapter_model.safetensors").exists()


def test_other_errors_are_not_hidden(run, monkeypatch):
    def fail(*args):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(finetune, "denoiser_gap", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run()


@pytest.mark.parametrize("losses", [(float("nan"), 0.1), (0.1, float("inf")), (0.0, 0.1), (0.1, 0.0)])
def test_what_is_no_loss_is_not_believed(losses, run, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "denoiser_gap", lambda *args: BaseGap("images", *losses, 4))
    folder = run()
    assert "was not compared with your observational set (its loss is " in capsys.readouterr().out
    assert not (folder / BASE_GAP).exists()


def test_of_two_processes_one_measures_what_one_process_would(start, together, pipeline_folder, tmp_path):
    given = settings(pipeline_folder("ddpm"), write_folders(tmp_path / "data"), tmp_path / "two", train_batch_size=2)
    one = start(given | {"output_dir": str(tmp_path / "one"), "train_batch_size": 4})
    assert [run.wait() for run in together(given, 2)] == [given["output_dir"]] * 2
    assert one.wait() == str(tmp_path / "one")
    two, one = (BaseGap.load(tmp_path / name) for name in ("two", "one"))
    assert (two.content, two.rows) == (one.content, one.rows)
    # Processes of a group compute with fewer threads, which rounds in another order.
    assert (two.on_set, two.on_samples) == pytest.approx((one.on_set, one.on_samples), rel=1e-6)


def test_other_processes_measure_nothing_and_say_nothing(tmp_path, capsys):
    other = SimpleNamespace(is_main_process=False)
    given = TrainingArguments(pretrained_model_name_or_path="base", output_dir=str(tmp_path))
    assert report_gap(other, given, refuse) is None
    assert capsys.readouterr().out == ""


def test_a_base_in_pieces_is_not_measured(together, pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data", captions=True)
    given = settings(pipeline_folder("stable_diffusion"), data, tmp_path / "out", shard_base=True)
    given |= {"validation_steps": 1}
    assert [run.wait() for run in together(given, 2)] == [given["output_dir"]] * 2
    assert not (tmp_path / "out" / BASE_GAP).exists()
    assert set(json.loads((tmp_path / "out" / "validation_losses.json").read_text())) == {"1", "2"}
