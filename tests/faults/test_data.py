"""Data that is spoilt while a training reads it: the error says which file, and the run goes on once it is back."""

import shutil

import pytest

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.training import finetune
from hf_causal_context.training.arguments import TextArguments, TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import fine_tune as language
from hf_causal_context.training.language import train_text
from hf_causal_context.training.loop.trainer import UnreadableDataError

from ..training.small import settings, write_folders
from ..training.small_language import language_model, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def data(tmp_path):
    return write_folders(tmp_path / "data")


def spoil_at(monkeypatch, module, name, spoil, call=3):
    """Call `spoil` before the loss of a micro-batch is computed."""
    make, calls = getattr(module, name), []

    def spoilt(*args):
        objective = make(*args)

        def compute(model, batch):
            calls.append(None)
            if len(calls) == call:
                spoil()
            return objective(model, batch)

        return compute

    monkeypatch.setattr(module, name, spoilt)


def cut(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])


def replace(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")


def remove(folder):
    for path in folder.glob("*.png"):
        path.unlink()


SPOILT = {
    "cut": (cut, "image file is truncated"),
    "no images": (replace, "cannot identify image file"),
    "removed": (remove, "No such file or directory"),
}
MODES = {"rows": {}, "stream": {"streaming": True}, "worker": {"dataloader_num_workers": 1}}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("spoil", "reason"), SPOILT.values(), ids=SPOILT)
def test_images_spoilt_while_training_are_named(mode, spoil, reason, pipeline_folder, data, tmp_path):
    changes = {"max_train_steps": 8, "checkpointing_steps": 2, **mode}
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", **changes)
    shutil.copytree(data, tmp_path / "copy")
    expected = (
        rf"(?s)The data of step [4-6] cannot be read: .*{data}/thick/[0-3].png: .*{reason}.* The last complete "
        rf"checkpoint is {tmp_path}/out/checkpoint-[24]. Put back what was there when the run began"
    )
    with pytest.MonkeyPatch.context() as patch:
        spoil_at(patch, finetune, "denoising_objective", lambda: spoil(data / "thick"))
        with pytest.raises(UnreadableDataError, match=expected):
            train(TrainingArguments(**given))
    assert not list((tmp_path / "out").glob("*.safetensors"))

    shutil.copytree(tmp_path / "copy", data, dirs_exist_ok=True)
    resumed = train(TrainingArguments(**given, resume_from_checkpoint="latest"))
    whole = train(TrainingArguments(**given | {"output_dir": str(tmp_path / "whole")}))
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_latents_do_not_need_the_images_any_more(pipeline_folder, data, tmp_path, monkeypatch):
    """They are computed before the training."""
    given = settings(pipeline_folder("stable_diffusion"), data, tmp_path / "out", max_train_steps=6)
    spoil_at(monkeypatch, finetune, "denoising_objective", lambda: shutil.rmtree(data), call=1)
    assert list(checkpoint_steps(train(TrainingArguments(**given)))) == [6]


@pytest.fixture
def texts(tmp_path):
    root = tmp_path / "texts"
    for context in ("obs", "formal"):
        (root / context).mkdir(parents=True)
        lines = [f'{{"text": "a {word} sat on the mat"}}' for word in ("cat", "dog", "cat", "dog")]
        (root / context / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return root


def text_arguments(texts, output_dir, **changes):
    return TextArguments(
        pretrained_model_name_or_path="unused",
        train_data_dir=str(texts),
        output_dir=str(output_dir),
        train_batch_size=2,
        max_train_steps=8,
        checkpointing_steps=2,
        num_validation_texts=0,
        **changes,
    )


def test_a_line_that_is_no_json_is_found_before_the_training(texts, tmp_path):
    with open(texts / "formal" / "texts.jsonl", "a") as file:
        file.write('{"text": "it ba')
    with pytest.raises(ValueError, match=f"Line 5 of '{texts}/formal/texts.jsonl': not JSON"):
        train_text(text_arguments(texts, tmp_path / "out"), language_model("llama"), word_tokenizer())


def test_a_line_that_is_no_json_in_the_middle_of_a_stream(texts, tmp_path, monkeypatch):
    def spoil():
        with open(texts / "formal" / "texts.jsonl", "a") as file:
            file.write('{"text": "it ba')

    spoil_at(monkeypatch, language, "LanguageModelingObjective", spoil)
    expected = (
        rf"The data of step [45] cannot be read: .*Line 5 of '{texts}/formal/texts.jsonl': not JSON.*"
        rf"The last complete checkpoint is {tmp_path}/out/checkpoint-[24]. Put back what was there"
    )
    with pytest.raises(UnreadableDataError, match=expected):
        train_text(text_arguments(texts, tmp_path / "out", streaming=True), language_model("llama"), word_tokenizer())


def test_a_folder_of_texts_that_is_emptied_under_a_stream(texts, tmp_path, monkeypatch):
    spoil_at(monkeypatch, language, "LanguageModelingObjective", lambda: shutil.rmtree(texts / "formal"))
    expected = r"The data of step [45] cannot be read: .*formal/texts.jsonl.*The last complete checkpoint is"
    with pytest.raises(UnreadableDataError, match=expected):
        train_text(text_arguments(texts, tmp_path / "out", streaming=True), language_model("llama"), word_tokenizer())
