"""Output folders that cannot be written to. Disks that fill up: see `training/test_faults.py`."""

import re
import subprocess

import pytest
from PIL import Image

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.cli import main
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop import trainer
from hf_causal_context.training.loop.checkpoints import CheckpointError

from ..training.small import settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def data(tmp_path):
    return write_folders(tmp_path / "data")


def make_read_only(disk, read_only=True):
    how = "ro" if read_only else "rw"
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


@pytest.mark.parametrize("inside", ["", "deeper/out"])
def test_an_output_folder_that_is_a_file(inside, pipeline_folder, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "file" / inside)
    expected = f"--output_dir={given['output_dir']}: {tmp_path}/file is a file, not a folder. Choose another folder"
    with pytest.raises(CheckpointError, match=expected):
        train(TrainingArguments(**given))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("folder", [".", "new/out"])
def test_a_read_only_output_folder_is_refused_before_anything_is_loaded(folder, small_disk, data):
    disk = small_disk("1m")
    make_read_only(disk)
    given = settings("nowhere", data, disk / folder, report_to="tensorboard")
    expected = f"{disk} cannot be written to. There is no checkpoint yet. Make it writable, or choose another folder"
    with pytest.raises(CheckpointError, match=expected):
        train(TrainingArguments(**given))


def test_a_disk_that_becomes_read_only_costs_no_checkpoint(small_disk, pipeline_folder, data, monkeypatch):
    disk = small_disk("4m")
    out = disk / "out"
    save = trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *args: (save(*args), make_read_only(disk)))
    given = settings(pipeline_folder("ddpm"), data, out, max_train_steps=4, checkpointing_steps=2)
    expected = (
        f"Could not write {out}/checkpoint-4 .*[Rr]ead-only file system.*"
        f"The last complete checkpoint is {out}/checkpoint-2"
    )
    with pytest.raises(CheckpointError, match=expected):
        train(TrainingArguments(**given))
    make_read_only(disk, False)
    monkeypatch.undo()
    train(TrainingArguments(**given, resume_from_checkpoint="latest"))
    assert list(checkpoint_steps(out)) == [2, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the tracker's thread
def test_a_disk_that_a_tracker_finds_broken_first_is_said_by_the_checkpoint(small_disk, pipeline_folder, data, capsys):
    """A tracker writes to the same disk at every step; that it cannot is no reason to lose the run."""
    disk = small_disk("4m")
    given = settings(
        pipeline_folder("ddpm"), data, disk / "out", max_train_steps=4, checkpointing_steps=4, report_to="tensorboard"
    )
    begin = trainer.start_trackers

    def begin_and_fill(*args):
        begin(*args)
        make_read_only(disk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "start_trackers", begin_and_fill)
        with pytest.raises(CheckpointError, match=re.escape(f"Could not write {disk}/out/checkpoint-4")):
            train(TrainingArguments(**given))
    make_read_only(disk, False)


@pytest.mark.filterwarnings("ignore:.*The reconstruction did not hold")
def test_commands_on_a_full_disk_leave_whole_files_and_say_what_to_do(
    small_disk, pipeline_folder, data, tmp_path, capsys
):
    adapter = train(TrainingArguments(**settings(pipeline_folder("ddpm"), data, tmp_path / "out")))
    disk = small_disk("16k")  # of four pages, one for each file
    steps = ["--num_inference_steps", "2"]
    for command in (
        ["generate", "--contexts", "obs", "slant", *steps],
        ["edit", "--images", *map(str, sorted(data.rglob("*.png"))[:4]), "--contexts", "slant", *steps],
        ["merge", "--context", "slant"],
        ["export", "--contexts", "singles", "--format", "peft"],
    ):
        out = disk / command[0]
        assert main([*command, "--adapter", str(adapter), "--output_dir", str(out)]) == 1
        said = capsys.readouterr().err
        assert re.search(r"error: .*No space left on device.*\. A disk is full: that of the output", said), command
        made = [path for path in out.rglob("*") if path.is_file()]
        for path in made:
            Image.open(path).load()
            path.unlink()
        assert bool(made) == (command[0] in ("generate", "edit"))
