"""The loss of every context after each validation: printed, logged, comparable, and the same in a resumed run."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_causal_context.bases.tokens import Tokenization
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.context_losses import LOSSES
from hf_causal_context.training.denoiser import losses as denoiser_losses
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import losses as language_losses
from hf_causal_context.training.language import train_text

from .small import adapter_weights, settings, write_folders
from .small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def run(pipeline_folder, tmp_path):
    """A function: train a tiny pipeline, with or without a held-out context -> the output folder."""

    def call(name="ddpm", output_dir="out", held_out=True, **changes):
        root = tmp_path / ("held-out" if held_out else "singles")
        if not root.exists():
            write_folders(root, captions=name != "ddpm")
            if held_out:
                shutil.copytree(root / "thick", root / "slant+thick")
                for i, path in enumerate(sorted((root / "slant+thick").glob("*.png"))):
                    Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(path)
        given = {"resolution": 16, "max_train_steps": 4, "validation_steps": 2, "num_inference_steps": 1} | changes
        return train(TrainingArguments(**settings(pipeline_folder(name), root, tmp_path / output_dir, **given)))

    return call


@pytest.fixture
def run_text(tmp_path):
    def call(output_dir="out", held_out=True, **changes):
        given = {"max_train_steps": 4, "validation_steps": 2, "streaming": False} | changes
        data = text_data(held_out=held_out, streaming=given["streaming"])
        changed = arguments(tmp_path, output_dir=str(tmp_path / output_dir), **given)
        return train_text(changed, language_model("llama"), word_tokenizer(), data)

    return call


def tables(out):
    """What was printed about losses, as lists of lines."""
    return [found.splitlines() for found in re.findall(r"^Step \d+, .* of .*:\n(?:  .*\n)+", out, re.MULTILINE)]


def stored(folder):
    return json.loads((folder / LOSSES).read_text())


def test_held_out_contexts_of_images_are_told_with_their_change(run, capsys):
    folder = run(report_to="tensorboard")
    first, second = tables(capsys.readouterr().out)
    losses = stored(folder)
    assert list(losses) == ["2", "4"]
    values = [losses[step]["slant+thick"] for step in losses]
    assert values[0] != values[1]
    assert first == ["Step 2, denoising loss of held-out contexts:", f"  slant+thick  {values[0]:.4f}"]
    assert second == [
        "Step 4, denoising loss of held-out contexts, and its change since step 2:",
        f"  slant+thick  {values[1]:.4f}  {values[1] - values[0]:+.4f}",
    ]
    (events,) = (folder / "logs" / "hf_causal_context").glob("events.out.*")
    log = EventAccumulator(str(events)).Reload()
    logged = log.Scalars("validation_denoising_loss/slant+thick")
    assert [event.step for event in logged] == [2, 4]
    assert [event.value for event in logged] == pytest.approx(values)
    assert not (folder / "samples").exists()  # --num_validation_images 0


def test_without_held_out_contexts_those_trained_on_are_told_and_said_to_be(run, run_text, capsys):
    assert list(stored(run(held_out=False))["2"]) == ["obs", "slant", "thick"]
    assert list(stored(run_text("texts", held_out=False))["2"]) == ["obs", "formal", "loud"]
    images, _, texts, _ = tables(capsys.readouterr().out)
    assert images[0] == "Step 2, denoising loss of contexts that are trained on (none is held out):"
    assert texts[0] == "Step 2, perplexity of contexts that are trained on (none is held out):"
    assert len({line.index(".") for line in images[1:]}) == 1  # aligned


def test_held_out_contexts_of_texts_are_told_with_their_change(run_text, capsys):
    folder = run_text(report_to="tensorboard")
    _, second = tables(capsys.readouterr().out)
    values = [losses["formal+loud"] for losses in stored(folder).values()]
    assert second == [
        "Step 4, perplexity of held-out contexts, and its change since step 2:",
        f"  formal+loud  {values[1]:.4f}  {values[1] - values[0]:+.4f}",
    ]
    (events,) = (folder / "logs" / "hf_causal_context").glob("events.out.*")
    logged = EventAccumulator(str(events)).Reload().Scalars("validation_perplexity/formal+loud")
    assert [event.value for event in logged] == pytest.approx(values)


@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion", "stable_diffusion_3"])
def test_the_same_weights_have_the_same_loss(name, run, tmp_path):
    """The noise and the time steps are the same at every validation."""
    losses = list(stored(run(name, learning_rate=1e-30)).values())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_validations_change_no_bit_of_the_adapter(streaming, run):
    watched = adapter_weights(run(streaming=streaming))
    plain = adapter_weights(run(streaming=streaming, validation_steps=None, output_dir="plain"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in watched.items())


@pytest.mark.parametrize(("kind", "elsewhere"), [("images", False), ("texts", False), ("images", True)])
def test_a_resumed_run_tells_the_same(kind, elsewhere, run, run_text, capsys, tmp_path):
    call = run if kind == "images" else run_text
    given = {"checkpointing_steps": 3, "validation_steps": 1, "observational_steps": 1}
    whole = stored(call(max_train_steps=6, **given, output_dir="whole"))
    expected = tables(capsys.readouterr().out)
    given["output_dir"] = "parts"
    call(max_train_steps=4, **given)
    capsys.readouterr()
    changes = {"resume_from_checkpoint": "checkpoint-3"}
    if elsewhere:
        changes = {"resume_from_checkpoint": str(tmp_path / "parts" / "checkpoint-3"), "output_dir": "elsewhere"}
    folder = call(max_train_steps=6, **given | changes)
    assert tables(capsys.readouterr().out) == expected[2:]  # a resumed run begins with the validation of its checkpoint
    assert stored(folder) == whole


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(run):
    run(checkpointing_steps=3, validation_steps=1)
    folder = run(resume_from_checkpoint="checkpoint-3", validation_steps=5, max_train_steps=6)
    assert list(stored(folder)) == ["1", "2", "3", "5", "6"]


def test_another_run_in_the_folder_begins_anew(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOSSES).write_text('{"1": {"slant+thick": 1.0}}')
    assert list(stored(run())) == ["2", "4"]
    assert "since step 1" not in capsys.readouterr().out


def test_without_validations_nothing_is_measured(run, run_text, monkeypatch, capsys):
    monkeypatch.setattr(denoiser_losses, "part_of", None)
    assert not (run(validation_steps=None) / LOSSES).exists()
    assert not (run_text("texts", held_out=False, validation_steps=None) / LOSSES).exists()
    assert tables(capsys.readouterr().out) == []


def test_grids_come_with_losses(run, capsys):
    folder = run(validation_steps=None, num_validation_images=1)
    assert list(stored(folder)) == ["4"]
    assert (folder / "samples" / "step-000004.png").exists()


@pytest.mark.parametrize("contexts", [3, 40, 200])
def test_the_rows_of_a_validation_are_bounded(contexts, monkeypatch):
    asked = []

    class Rows:
        def few(self, context, num):
            asked.append(num)

    given = TrainingArguments(pretrained_model_name_or_path="base", output_dir="out")
    monkeypatch.setattr(denoiser_losses, "denoising_objective", lambda *args: None)
    names = [f"c{i}" for i in range(contexts)]
    denoiser_losses.denoising_losses(None, None, None, Rows(), given, names, True)
    assert len(asked) == contexts
    assert sum(asked) <= max(512, 4 * contexts)
    assert min(asked) >= 4
    assert max(asked) <= 32


@pytest.mark.parametrize("held_out", [False, True])
def test_texts_are_drawn_from_all_rows_of_a_context(held_out, monkeypatch):
    monkeypatch.setattr(language_losses, "_HELD_OUT_ROWS" if held_out else "_TRAINED_ROWS", 1)
    data, tokenize = text_data(held_out=held_out), Tokenization(word_tokenizer(), "text")
    context = "formal+loud" if held_out else "formal"
    drawn = [language_losses.rows_to_measure(data, tokenize, seed, None)[context] for seed in range(9)]
    assert {len(rows) for rows in drawn} == {1}
    assert len({tuple(rows[0].ids) for rows in drawn}) > 1
