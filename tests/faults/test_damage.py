"""Checkpoints whose files are spoilt: latest passes over them and says so, one that is named is an error."""

import re
import shutil

import pytest
from accelerate.state import AcceleratorState, GradientState

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop.checkpoints import CheckpointError

from ..training.small import settings, write_folders


def cut(name):
    """Cut a file in half."""

    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def flip_a_bit(name):
    def spoil(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def fill_with_zeros(folder):
    """What a machine that lost its power may leave."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "cut weights": (cut("adapter_model.safetensors"), "adapter_model.safetensors: .*incomplete metadata"),
    "cut optimizer": (cut("optimizer.bin"), "optimizer.bin: File is not a zip file"),
    "cut random states": (cut("random_states_0.pkl"), "random_states_0.pkl: File is not a zip file"),
    "cut average": (cut("custom_checkpoint_1.pkl"), "custom_checkpoint_1.pkl: File is not a zip file"),
    "cut arguments": (cut("training_arguments.json"), "training_arguments.json: "),
    "cut configuration": (cut("adapter_config.json"), "adapter_config.json: "),
    "a wrong bit": (flip_a_bit("optimizer.bin"), "optimizer.bin: the checksum of .* is wrong"),
    "a wrong bit of weights": (
        flip_a_bit("adapter_model.safetensors"),
        "adapter_model.safetensors: its checksum is wrong",
    ),
    "cut record": (cut("checkpoint.json"), "checkpoint.json: "),
    "zeros": (fill_with_zeros, "adapter_model.safetensors: .*header"),
    "an empty folder": (
        empty,
        "adapter_config.json, adapter_model.safetensors, custom_checkpoint_0.pkl, optimizer.bin",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors missing"),
    "no average": (lambda folder: (folder / "custom_checkpoint_1.pkl").unlink(), "custom_checkpoint_1.pkl missing"),
}


@pytest.fixture(scope="module")
def trained(pipeline_folder, tmp_path_factory):
    """A run of three steps with a checkpoint each, and its settings."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"max_train_steps": 3, "checkpointing_steps": 1, "use_ema": True, "lr_scheduler": "cosine"}
    given = settings(pipeline_folder("ddpm"), write_folders(folder / "data"), folder / "out", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train(TrainingArguments(**given))
    return folder / "out", given


@pytest.fixture
def copy(trained, tmp_path, on_cpu):
    """A copy that a test may spoil: its folder, and the settings of a run that goes on."""
    folder, given = trained
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    return tmp_path / "out", given | {"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": "latest"}


@pytest.mark.parametrize(("spoil", "found"), DAMAGES.values(), ids=DAMAGES)
def test_latest_passes_over_a_damaged_checkpoint_and_says_so(spoil, found, copy, trained, capsys):
    folder, given = copy
    spoil(folder / "checkpoint-3")
    train(TrainingArguments(**given))
    assert_said(
        capsys.readouterr().out,
        rf"{folder}/checkpoint-3 is damaged \({found}.*\): it is passed over",
        f"Resumed from {folder}/checkpoint-2",
    )
    assert list(checkpoint_steps(folder)) == [1, 2, 3]
    for name in ("adapter_model.safetensors", "checkpoint-3/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()


@pytest.mark.parametrize(("spoil", "found"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_that_is_named_is_an_error(spoil, found, copy):
    folder, given = copy
    spoil(folder / "checkpoint-2")
    expected = (
        rf"--resume_from_checkpoint=checkpoint-2 is damaged \({found}.*\)\. In {folder} there are: checkpoint-1, "
        "checkpoint-2, checkpoint-3. Give another one, or latest"
    )
    with pytest.raises(CheckpointError, match=expected):
        train(TrainingArguments(**given | {"resume_from_checkpoint": "checkpoint-2"}))
    assert list(checkpoint_steps(folder)) == [1, 2, 3]


def test_a_checkpoint_without_a_record_is_an_older_one(copy, trained):
    folder, given = copy
    (folder / "checkpoint-3" / "checkpoint.json").unlink()
    train(TrainingArguments(**given))
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()


def test_two_damaged_checkpoints_are_passed_over(copy, trained, capsys):
    folder, given = copy
    empty(folder / "checkpoint-3")
    cut("optimizer.bin")(folder / "checkpoint-2")
    train(TrainingArguments(**given))
    assert_said(capsys.readouterr().out, "checkpoint-3 is damaged", "checkpoint-2 is damaged", "Resumed from .*point-1")
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()


def test_a_run_does_not_begin_anew_where_all_checkpoints_are_damaged(copy):
    folder, given = copy
    for path in checkpoint_steps(folder).values():
        cut("optimizer.bin")(path)
    expected = f"All checkpoints in {folder} are damaged: checkpoint-1, checkpoint-2, checkpoint-3. Restore one from a"
    with pytest.raises(CheckpointError, match=expected):
        train(TrainingArguments(**given))
    assert list(checkpoint_steps(folder)) == [1, 2, 3]


def assert_said(text, *patterns):
    """In this order."""
    assert re.search(".*".join(patterns), text, re.DOTALL), text
