"""`--dry_run` says what a run will take, counted, and writes nothing."""

import re

import datasets.config
import pytest

from hf_causal_context.cli import main
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.edits import EditObjective
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import train_text

from .small import settings, write_folders
from .small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


def said(output):
    """Name -> bytes, of the lines of memory."""
    lines = re.findall(r"^  (\S.*?) +([\d.]+) ([KMG]?B)\b", output, re.MULTILINE)
    return {name: float(number) * UNITS[unit] for name, number, unit in lines}


@pytest.fixture
def dry(pipeline_folder, tmp_path, capsys):
    data = write_folders(tmp_path / "data", captions=True)

    def dry(name="stable_diffusion", **changes):
        given = settings(pipeline_folder(name), data, tmp_path / "out", dry_run=True, **changes)
        train(TrainingArguments(**given))
        return capsys.readouterr().out

    return dry


def test_memory_is_counted_by_part(dry):
    output = dry(use_ema=True)
    memory = said(output)
    (parameters,) = re.findall(r"The adapter has ([\d,]+) parameters", output)
    adapter = 4 * int(parameters.replace(",", ""))
    for name, times in {"adapter": 1, "its gradients": 1, "optimizer (adamw)": 2, "moving average": 1}.items():
        assert memory[name] == pytest.approx(times * adapter, rel=0.01), name
    idle = {"vae", "text_encoder"}
    assert all(f"{name} " in output for name in idle)
    assert output.count("(before the first step only)") == len(idle)
    assert memory["a step, at least"] == pytest.approx(
        sum(size for name, size in memory.items() if name not in idle and name != "a step, at least"), rel=0.02
    )
    assert re.search(r"clean +\(3, 4, 8, 8\)  float32", output)
    assert re.search(r"Time: .* s a step, 0:00:\d\d for 2 steps", output)


def test_what_is_kept_grows_with_the_batch_and_shrinks_with_checkpointing(dry):
    name = "kept for the backward pass"
    plain, larger, checkpointed = (
        said(dry(**changes))[name] for changes in ({}, {"train_batch_size": 6}, {"gradient_checkpointing": True})
    )
    assert larger == pytest.approx(2 * plain, rel=0.05)
    assert checkpointed < 0.8 * plain


def test_batches_of_one_step_are_not_kept_at_once(dry):
    name = "kept for the backward pass"
    one, three = (said(dry(gradient_accumulation_steps=count))[name] for count in (1, 3))
    assert three == pytest.approx(one, rel=0.02)


def test_pairs_that_few_batches_edit_are_counted(dry, monkeypatch):
    seen, losses = [], EditObjective.losses
    monkeypatch.setattr(EditObjective, "losses", lambda *given: seen.append(0) or losses(*given))
    name = "kept for the backward pass"
    one, four, paired = (
        said(dry(**changes))[name]
        for changes in (
            {"train_batch_size": 1},
            {"train_batch_size": 4},
            {"train_batch_size": 1, "paired_files": True},
        )
    )
    assert paired == pytest.approx(one + four, rel=0.2)  # the sample, and four states of its edit
    assert len(seen) == 1  # of as many rows as have one pair


def test_a_quantized_base_is_smaller(dry):
    plain, small = (said(dry("stable_diffusion_3", **c))["transformer"] for c in ({}, {"quantization": "int8"}))
    assert small < 0.5 * plain


def test_nothing_is_written(dry, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    dry(reweighted_contexts=["pairs"])
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    assert not list(tmp_path.rglob("latents-*"))


def test_language_models_too(tmp_path, capsys):
    language_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    before = sorted(tmp_path.rglob("*"))
    train_text(arguments(tmp_path, dry_run=True), data=text_data())
    output = capsys.readouterr().out
    assert re.search(r"input_ids +\(6, \d+\)  int64", output)
    assert said(output)["base"] > 0
    assert "writes itself" not in output
    train_text(arguments(tmp_path, dry_run=True, self_composed_contexts=["pairs"]), data=text_data())
    assert "(latents, embeddings), and the texts that the adapter writes itself." in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_edits_of_pairs_are_part_of_the_steps(dry):
    name = "kept for the backward pass"
    plain, paired = (said(dry(**changes))[name] for changes in ({}, {"paired_files": True}))
    assert paired > 1.5 * plain


def test_the_command_names_no_folder_that_is_not_there(pipeline_folder, tmp_path, capsys):
    data = write_folders(tmp_path / "data")
    base = ["--pretrained_model_name_or_path", str(pipeline_folder("ddpm")), "--train_data_dir", str(data)]
    assert main(["train", *base, "--output_dir", str(tmp_path / "out"), "--max_train_steps", "9", "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert "for 9 steps" in output
    assert "The adapter is in" not in output
    assert not (tmp_path / "out").exists()
