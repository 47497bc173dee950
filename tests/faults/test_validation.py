"""Validations that fail: lack of memory is survived and said once of each kind, other errors are not."""

import re
from pathlib import Path

import pytest
import torch

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.training import finetune
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import fine_tune as language
from hf_causal_context.training.language import train_text

from ..training.small import adapter_weights, settings, write_folders
from ..training.small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.95 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError("Unable to allocate 3.00 GiB for an array"),
]


@pytest.fixture
def given(pipeline_folder, tmp_path):
    changes = {"max_train_steps": 6, "checkpointing_steps": 2, "use_ema": True}
    changes |= {"validation_steps": 2, "num_validation_images": 1, "num_inference_steps": 1}
    return settings(pipeline_folder("ddpm"), write_folders(tmp_path / "data"), tmp_path / "out", **changes)


def fail(errors):
    """A function that raises each of these once, and then the last again and again."""
    left = list(errors)

    def call(*args, **kwargs):
        raise left.pop(0) if len(left) > 1 else left[0]

    return call


def later(works, fails):
    """A function that works at its first call, before the first step, and then is the other one."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        return (works if len(calls) == 1 else fails)(*args, **kwargs)

    return call


def test_without_memory_before_the_first_step_the_training_goes_on(given, monkeypatch, capsys):
    generate = finetune.generate
    monkeypatch.setattr(finetune, "generate", later(fail([OUT_OF_MEMORY[0]]), generate))
    folder = train(TrainingArguments(**given))
    said = capsys.readouterr().out
    assert said.count("ran out of memory") == 1
    assert "Validation ran out of memory at step 0 (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    assert "There is no checkpoint yet" in said
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["step-000002.png", "step-000004.png", "step-000006.png"]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:24])
def test_a_validation_without_memory_does_not_end_the_training(error, given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "generate", later(finetune.generate, fail([error])))
    folder = train(TrainingArguments(**given))
    said = capsys.readouterr().out
    assert said.count("ran out of memory") == 1
    expected = (
        rf"Validation ran out of memory at step 2 \({re.escape(str(error))}\). Training goes on without it, and tries "
        rf"again when the next is due. The last complete checkpoint is {folder}/checkpoint-2. Let it make less at once"
    )
    assert re.search(expected, said)
    assert list(checkpoint_steps(folder)) == [2, 4, 6]
    assert [path.name for path in folder.glob("samples/*")] == ["step-000000.png"]
    assert "samples/" not in (folder / "README.md").read_text()
    without = given | {"output_dir": str(tmp_path / "without"), "num_validation_images": 0}
    expected = adapter_weights(train(TrainingArguments(**without)))
    assert all(tensor.equal(expected[name]) for name, tensor in adapter_weights(folder).items())


def test_every_kind_is_said_once(given, monkeypatch, capsys):
    first, second = OUT_OF_MEMORY[0], OUT_OF_MEMORY[-1]
    monkeypatch.setattr(finetune, "generate", fail([first, second, first]))
    train(TrainingArguments(**given))
    said = capsys.readouterr().out
    assert [said.count(str(error)) for error in (first, second)] == [1, 1]


def test_the_next_validation_may_succeed(given, monkeypatch):
    generate, errors = finetune.generate, [OUT_OF_MEMORY[0]]

    def fail_first(*args, **kwargs):
        if errors:
            raise errors.pop()
        return generate(*args, **kwargs)

    monkeypatch.setattr(finetune, "generate", later(generate, fail_first))
    folder = train(TrainingArguments(**given))
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["step-000000.png", "step-000004.png", "step-000006.png"]
    assert "samples/step-000006.png" in (folder / "README.md").read_text()


def test_the_model_trains_on_in_training_mode(given, monkeypatch):
    make, modes = finetune.denoising_objective, []

    def noted(*args):
        objective = make(*args)
        return lambda model, batch: (modes.append(model.training), objective(model, batch))[1]

    monkeypatch.setattr(finetune, "denoising_objective", noted)
    monkeypatch.setattr(finetune, "generate", fail([OUT_OF_MEMORY[0]]))
    train(TrainingArguments(**given))
    assert modes == [True] * 6


def test_encoders_rest_again_after_it(pipeline_folder, given, monkeypatch):
    places = []
    monkeypatch.setattr(DiffusionBase, "move_encoders", lambda self, device: places.append(str(device)))
    monkeypatch.setattr(finetune, "generate", fail([OUT_OF_MEMORY[0]]))
    changes = {"pretrained_model_name_or_path": pipeline_folder("stable_diffusion"), "validation_steps": None}
    train(TrainingArguments(**given | changes))
    assert len(places) == 6  # to encode the data, at rest, and around the samples before the first step and at the end


def test_other_errors_end_the_training(given, monkeypatch):
    failing = fail([RuntimeError("shapes cannot be multiplied")])
    monkeypatch.setattr(finetune, "generate", later(finetune.generate, failing))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(TrainingArguments(**given))
    assert list(checkpoint_steps(Path(given["output_dir"]))) == [2]


def test_a_language_model_without_memory_for_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language, "sample_texts", later(language.sample_texts, fail([OUT_OF_MEMORY[0]])))
    given = arguments(tmp_path, max_train_steps=4, validation_steps=2, num_validation_texts=1)
    folder = train_text(given, language_model("llama"), word_tokenizer(), text_data())
    assert capsys.readouterr().out.count("Validation ran out of memory at step 2") == 1
    assert {"adapter_model.safetensors", "tokenizer.json", "card.json", "README.md"} <= names(folder)


def test_a_last_validation_that_fails_leaves_a_complete_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "sample_texts", later(language.sample_texts, fail([ValueError("no such token")])))
    given = arguments(tmp_path, num_validation_texts=1)
    with pytest.raises(ValueError, match="no such token"):
        train_text(given, language_model("llama"), word_tokenizer(), text_data())
    assert {"adapter_model.safetensors", "tokenizer.json", "card.json", "README.md"} <= names(tmp_path / "out")


def names(folder):
    return {path.name for path in folder.iterdir()}
