"""What `check-data` measures of a base: what a training would, whatever the base is conditioned on."""

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature

from hf_causal_context.bases.gap import BaseGap
from hf_causal_context.cli import main
from hf_causal_context.commands import base_gap
from hf_causal_context.commands.base_gap import gap_of
from hf_causal_context.data import from_dataset, load_folders, texts_from_dataset
from hf_causal_context.data.arguments import ComparedDataArguments
from hf_causal_context.training import finetune
from hf_causal_context.training.arguments import TextArguments, TrainingArguments
from hf_causal_context.training.denoiser import gap
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import fine_tune, train_text

from .small import settings, write_clips, write_folders
from .small_language import language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def data(tmp_path):
    """A function: whether it is a stream -> images with captions and classes."""
    files = sorted(write_folders(tmp_path / "data").rglob("*.png"))
    columns = {"image": [str(path) for path in files], "context": [path.parent.name for path in files]}
    columns |= {"text": [f"a {i % 3}" for i in range(len(files))], "digit": [i % 5 for i in range(len(files))]}
    rows = Dataset.from_dict(columns).cast_column("image", ImageFeature())

    def make(caption_column, streaming=False):
        given = rows.to_iterable_dataset() if streaming else rows
        return from_dataset(given, caption_column=caption_column, concepts=("slant", "thick"))

    return make


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["ddpm", "ddpm_classes", "stable_diffusion", "stable_diffusion_3", "dit"])
def test_it_is_what_a_training_measures(name, streaming, data, pipeline_folder, tmp_path):
    classes = "digit" if name in ("ddpm_classes", "dit") else None
    rows = data("text" if name.startswith("stable") else None, streaming)
    base = pipeline_folder(name)
    checked = gap_of(rows, ComparedDataArguments(pretrained_model_name_or_path=base, class_column=classes))
    given = settings(base, tmp_path, tmp_path / "out", max_train_steps=1, class_column=classes, train_data_dir=None)
    folder = train(TrainingArguments(**given), data=rows)
    assert BaseGap.load(folder).times == pytest.approx(checked.times, rel=1e-4)


def test_a_base_that_the_data_does_not_fit_is_refused_as_in_training(data, pipeline_folder):
    with pytest.raises(ValueError, match="conditioned on classes, but --class_column=None names no column"):
        gap_of(data(None), ComparedDataArguments(pretrained_model_name_or_path=pipeline_folder("dit")))
    with pytest.raises(ValueError, match="The data has captions, but DDPMPipeline takes none"):
        gap_of(data("text"), ComparedDataArguments(pretrained_model_name_or_path=pipeline_folder("ddpm")))


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2)])
def test_clips_are_as_long_as_they_would_be_trained_on(frames, latents, pipeline_folder, tmp_path, monkeypatch):
    clips = load_folders(write_clips(tmp_path, frames=9), frame_folders=True)
    shapes = []
    monkeypatch.setattr(gap, "denoiser_gap", lambda base, rows, seed: shapes.append(rows.clean.shape))
    gap_of(clips, ComparedDataArguments(pretrained_model_name_or_path=pipeline_folder("wan"), num_frames=frames))
    assert [shape[2] for shape in shapes] == [latents]


def test_a_base_of_two_denoisers_is_not_compared_by_one_of_them(pipeline_folder, tmp_path, capsys):
    root = write_clips(tmp_path)
    command = ["check-data", "--train_data_dir", str(root), "--num_frames", "5"]
    assert main([*command, "--pretrained_model_name_or_path", pipeline_folder("wan_2_2")]) == 0
    assert "was not compared with your observational set (its denoisers of high and of" in capsys.readouterr().out


def test_lack_of_memory_is_said(pipeline_folder, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gap, "denoiser_gap", fail)
    root = write_folders(tmp_path)
    command = ["check-data", "--train_data_dir", str(root), "--pretrained_model_name_or_path", pipeline_folder("ddpm")]
    assert main(command) == 0
    assert "was not compared with your observational set (it ran out of memory: CUDA" in capsys.readouterr().out


def test_it_says_that_a_base_would_get_the_empty_prompt(data, pipeline_folder, capsys):
    gap_of(data(None), ComparedDataArguments(pretrained_model_name_or_path=pipeline_folder("stable_diffusion")))
    assert "The data has no captions: the empty prompt is used." in capsys.readouterr().out
    gap_of(data("text"), ComparedDataArguments(pretrained_model_name_or_path=pipeline_folder("stable_diffusion")))
    assert "captions" not in capsys.readouterr().out


@pytest.mark.parametrize("streaming", [False, True])
def test_it_counts_rows_that_a_model_cannot_hold(streaming, tmp_path, capsys):
    language_model("llama").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    given = ComparedDataArguments(pretrained_model_name_or_path=str(tmp_path))
    gap_of(text_data(streaming=streaming), given)
    assert "Cut at" not in capsys.readouterr().out
    rows = [
        {"text": "a cat sat on the mat " * (3 if n % 3 else 20), "context": c} for c in ("", "loud") for n in range(3)
    ]
    texts = texts_from_dataset(Dataset.from_list([*rows, {"text": "a cat", "context": "formal"}]))
    gap_of(texts, given)
    expected = "Cut at --max_length=64: 1 of 3 rows of the observational context, 1 of 3 rows of 'loud'. A text that is"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_contexts": ["thik"]}, "Unknown concept 'thik'"),
        ({"context_weights": ["thik=2"]}, "--context_weights names 'thik', which is not trained on"),
        ({"reweighted_contexts": ["thick+slnt"]}, "Unknown concept 'slnt'"),
        ({"random_flip": True, "flip_changes": ["thik"]}, "--flip_changes names 'thik', which is no concept"),
        ({"class_data_dir": "nowhere", "class_prompt": "a"}, "--class_data_dir='nowhere' has no images"),
        ({"optimizer": "lion", "optimizer_args": ["beta=1"]}, "--optimizer_args: lion has no|--optimizer=lion needs"),
    ],
)
def test_names_that_the_data_does_not_have_are_refused_before_the_base_is_loaded(
    changes, message, pipeline_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(finetune, "load_base", lambda *given, **options: pytest.fail("the base was loaded"))
    given = settings(pipeline_folder("ddpm"), write_folders(tmp_path / "data"), tmp_path / "out", **changes)
    with pytest.raises((ValueError, ImportError), match=message):
        train(TrainingArguments(**given))


def test_parts_of_texts_that_there_are_not_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    for module in (fine_tune, base_gap):
        monkeypatch.setattr(module, "load_language_model", lambda *given, **options: pytest.fail("it was loaded"))
    language_model("llama").save_pretrained(tmp_path / "base")
    given = {"pretrained_model_name_or_path": str(tmp_path / "base"), "assistant_only_loss": True}
    message = "--assistant_only_loss learns the assistant's turns of 'messages'. The rows have 'text'"
    with pytest.raises(ValueError, match=message):
        train_text(TextArguments(**given, output_dir=str(tmp_path / "out")), data=text_data())
    with pytest.raises(ValueError, match=message):
        gap_of(text_data(), ComparedDataArguments(**given))
