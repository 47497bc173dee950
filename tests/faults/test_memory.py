"""A step without enough memory ends the run, which then goes on with less."""

import re

import pytest
import torch
from diffusers import UNet2DModel

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.training import finetune
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments
from hf_causal_context.training.denoiser.batches import DenoiserBatches
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import train_text
from hf_causal_context.training.loop.memory import TrainingMemoryError, less_memory

from ..training.small import adapter_weights, assert_close_to_largest, settings, write_folders
from ..training.small_language import arguments, language_model, text_data, word_tokenizer
from .test_validation import OUT_OF_MEMORY

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def given(pipeline_folder, tmp_path):
    changes = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
    return settings(pipeline_folder("ddpm"), write_folders(tmp_path / "data"), tmp_path / "out", **changes)


@pytest.fixture
def fail(monkeypatch):
    """A function: number of a micro-batch, an error -> runs of this test meet the error there."""

    def at(number, error):
        make = finetune.denoising_objective

        def failing(*args):
            objective, left = make(*args), iter(range(number, 0, -1))

            def call(model, batch):
                if next(left) == 1:
                    raise error
                return objective(model, batch)

            return call

        monkeypatch.setattr(finetune, "denoising_objective", failing)

    return at


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:24])
def test_a_step_without_memory_says_what_needs_less(error, fail, given, tmp_path, monkeypatch):
    fail(6, error)
    expected = (
        rf"Step 3 ran out of memory \({re.escape(str(error))}\). The last complete checkpoint is "
        rf"{given['output_dir']}/checkpoint-2. Resume with --gradient_checkpointing or --shard_base .several "
    )
    with pytest.raises(TrainingMemoryError, match=expected):
        train(TrainingArguments(**given))
    assert list(checkpoint_steps(tmp_path / "out")) == [2]
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train(TrainingArguments(**given, resume_from_checkpoint="latest", gradient_checkpointing=True))
    whole = train(TrainingArguments(**given | {"output_dir": str(tmp_path / "whole")}))
    assert_close_to_largest(adapter_weights(tmp_path / "out"), adapter_weights(whole))


def test_the_command_ends_with_the_message_alone(fail, given, capsys):
    fail(1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nframe #0: trace"))
    line = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert main(["train", *line]) == 1
    said = capsys.readouterr().err
    assert "error: Step 1 ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.). There is no" in said
    assert "Traceback" not in said
    assert "frame #0" not in said


def test_other_errors_of_a_step_stay_as_they_are(fail, given):
    fail(1, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match=r"^shapes cannot be multiplied$"):
        train(TrainingArguments(**given))


def test_only_what_a_run_can_still_do_is_advised(given):
    begin = less_memory(TrainingArguments(**given, gradient_checkpointing=True)).partition(",")[0]
    assert begin == "Resume with --shard_base (several processes)"
    assert less_memory(AutoencoderArguments(output_dir="out")).startswith(
        "Start anew with a smaller --train_batch_size"
    )


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_base_that_is_too_large_for_the_device(kind, given, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def fail(self, *args, **kwargs):
        raise error

    match = r"Placing the base on cpu ran out of memory \(CUDA out of memory.*with --shard_base"
    if kind == "image":
        monkeypatch.setattr(UNet2DModel, "to", fail)
        with pytest.raises(TrainingMemoryError, match=match):
            train(TrainingArguments(**given), base=load_base(given["pretrained_model_name_or_path"]))
    else:
        model = language_model("llama")
        monkeypatch.setattr(type(model), "to", fail)
        with pytest.raises(TrainingMemoryError, match=match):
            train_text(arguments(tmp_path), model, word_tokenizer(), text_data())
    assert not (tmp_path / "out").exists()


def test_a_reader_without_memory_is_no_unreadable_data(given, monkeypatch):
    def fail(*args):
        raise MemoryError("Unable to allocate 3.00 GiB for an array")

    monkeypatch.setattr(DenoiserBatches, "__call__", lambda self, first, **_: iter(fail, None))
    with pytest.raises(TrainingMemoryError, match="Step 1 ran out of memory .Unable to allocate"):
        train(TrainingArguments(**given))
