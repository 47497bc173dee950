"""What happens to a run that is killed, interrupted, diverges, or finds the disk full."""

import itertools
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from hf_causal_context._files import checkpoint_steps, complete_or_absent
from hf_causal_context.training import finetune
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop import trainer
from hf_causal_context.training.loop.checkpoints import CheckpointError
from hf_causal_context.training.loop.trainer import TrainingDivergedError

from .run_tiny import Faults
from .small import settings, write_folders

KILL = signal.SIGKILL
PATIENT = {
    "max_train_steps": 6,
    "checkpointing_steps": 2,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "train_batch_size": 2,
}
# (pipeline, whether it is a stream)
MODES = {
    "rows by number": ("ddpm", False),
    "stream": ("ddpm", True),
    "latents and captions of a stream": ("stable_diffusion", True),
}


@pytest.fixture
def data(tmp_path):
    return write_folders(tmp_path / "data")


def states(folder):
    """What a resumed run would go on with, and the adapter, as tensors and numbers."""
    names = ["optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"]
    return {name: torch.load(folder / name, weights_only=True) for name in names if (folder / name).exists()}


def assert_same_run(actual, expected):
    """Final adapter and last checkpoint are equal bit for bit."""
    actual, expected = Path(actual), Path(expected)
    assert max(checkpoint_steps(actual)) == max(checkpoint_steps(expected))
    last = next(reversed(checkpoint_steps(expected).values())).name
    for name in ("adapter_model.safetensors", f"{last}/adapter_model.safetensors"):
        assert (actual / name).read_bytes() == (expected / name).read_bytes()
    assert states(actual / last).keys() == {"optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"}
    torch.testing.assert_close(states(actual / last), states(expected / last), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_a_run_killed_at_every_step_equals_an_uninterrupted_one(mode, start, pipeline_folder, tmp_path):
    name, streaming = MODES[mode]
    data = write_folders(tmp_path / "data", captions=name == "stable_diffusion")
    given = settings(pipeline_folder(name), data, tmp_path / "whole", **PATIENT, streaming=streaming)
    whole = start(given)
    killed = given | {"output_dir": str(tmp_path / "killed"), "resume_from_checkpoint": "latest"}
    faults = [Faults(signal_after_step=(step, KILL)) for step in range(1, 7)]
    faults += [Faults(signal_in_microbatch=(number, KILL)) for number in (1, 2)]  # within the last two steps
    for fault in faults:
        run = start(killed, fault)
        assert run.wait() is None
        assert run.process.exitcode == -KILL
        assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    assert start(killed).wait() == killed["output_dir"]
    assert whole.wait() == given["output_dir"]
    assert_same_run(killed["output_dir"], given["output_dir"])


def test_a_run_that_is_complete_can_be_resumed(start, pipeline_folder, data, tmp_path):
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", use_ema=True)
    assert start(given).wait() == given["output_dir"]
    path = tmp_path / "out" / "adapter_model.safetensors"
    weights = path.read_bytes()
    path.unlink()
    assert start(given | {"resume_from_checkpoint": "checkpoint-2"}).wait() == given["output_dir"]
    assert path.read_bytes() == weights


def test_a_kill_within_a_checkpoint_leaves_the_previous_one(start, pipeline_folder, data, tmp_path):
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "whole", **PATIENT)
    whole = start(given)
    output_dir = tmp_path / "killed"
    killed = given | {"output_dir": str(output_dir), "resume_from_checkpoint": "latest"}
    assert start(killed, Faults(kill_while_saving=4)).wait() is None
    assert list(checkpoint_steps(output_dir)) == [2]
    assert (output_dir / ".checkpoint-4.unfinished" / "optimizer.bin").exists()
    resumed = start(killed)
    assert resumed.wait() == str(output_dir)
    assert not list(output_dir.glob(".*"))
    assert whole.wait() == given["output_dir"]
    assert_same_run(output_dir, given["output_dir"])


@pytest.mark.usefixtures("on_cpu")
def test_what_killed_runs_left_unfinished_is_removed(pipeline_folder, data, tmp_path):
    with complete_or_absent(tmp_path / "out" / "card.json") as unfinished:
        unfinished.write_text("half")
        name = unfinished.parent.name
        shutil.copytree(unfinished.parent, tmp_path / "left")
    for left in (name, ".checkpoint-2.unfinished", ".checkpoint-2.removed"):
        shutil.copytree(tmp_path / "left", tmp_path / "out" / left)
    train(TrainingArguments(**settings(pipeline_folder("ddpm"), data, tmp_path / "out")))
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 1])  # with one, the signal goes to it too: Ctrl-C in a terminal, batch systems
def test_an_interrupted_run_saves_and_says_how_to_go_on(number, workers, start, pipeline_folder, data, tmp_path):
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "whole", **PATIENT | {"checkpointing_steps": 100})
    whole = start(given)
    output_dir, ready = tmp_path / "stopped", tmp_path / "ready"
    stopped = given | {"output_dir": str(output_dir), "dataloader_num_workers": workers}
    run = start(stopped, Faults(ready_file=str(ready)))
    while not ready.exists():
        assert run.process.is_alive()
        time.sleep(0.005)
    (os.killpg if workers else os.kill)(run.process.pid, number)
    said = run.wait()
    (step,) = checkpoint_steps(output_dir)
    assert step < 6
    assert said == (
        f"TrainingInterrupted: Stopped after step {step} of 6. The last complete checkpoint is "
        f"{output_dir / f'checkpoint-{step}'}. Go on by running the same command with --resume_from_checkpoint latest."
    )
    assert not (output_dir / "adapter_model.safetensors").exists()
    assert start(stopped | {"resume_from_checkpoint": "latest"}).wait() == str(output_dir)
    assert whole.wait() == given["output_dir"]
    assert_same_run(output_dir, given["output_dir"])


@pytest.mark.usefixtures("on_cpu")
class TestDivergence:
    @pytest.fixture
    def spoil(self, monkeypatch):
        """A function: at the n-th micro-batch, change the losses."""

        def at(number, change):
            make, numbers = finetune.denoising_objective, itertools.count(1)

            def spoilt(*args):
                objective = make(*args)
                return lambda *inputs: change(objective(*inputs)) if next(numbers) == number else objective(*inputs)

            monkeypatch.setattr(finetune, "denoising_objective", spoilt)

        return at

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda losses: losses * float("nan"), "The loss became nan at step 4"),
            (lambda losses: losses * float("inf"), "The loss became inf at step 4"),
            # Finite, with an infinite gradient: d sqrt(x) / dx at 0.
            (lambda losses: losses + (0 * losses).sqrt(), "The gradient's norm became (nan|inf) at step 4"),
        ],
    )
    def test_it_stops_and_names_the_step_the_rate_and_the_checkpoint(
        self, change, message, spoil, pipeline_folder, data, tmp_path
    ):
        output_dir = tmp_path / "out"
        output_dir.mkdir()
        (output_dir / "adapter_model.safetensors").write_bytes(b"of an earlier run")
        given = settings(
            pipeline_folder("ddpm"), data, output_dir, max_train_steps=6, checkpointing_steps=2, learning_rate=0.0125
        )
        spoil(4, change)
        last = output_dir / "checkpoint-2"
        expected = (
            rf"{message} \(learning rate 0.0125\). Nothing was saved after it. The last complete checkpoint is {last}"
        )
        with pytest.raises(TrainingDivergedError, match=expected):
            train(TrainingArguments(**given))
        assert list(checkpoint_steps(output_dir)) == [2]
        assert (output_dir / "adapter_model.safetensors").read_bytes() == b"of an earlier run"
        weights = PeftModel.from_pretrained(
            finetune.load_base(pipeline_folder("ddpm")).denoiser, str(last)
        ).state_dict()
        assert all(tensor.isfinite().all() for tensor in weights.values())

    def test_within_the_first_step_there_is_no_checkpoint(self, spoil, pipeline_folder, data, tmp_path):
        spoil(1, lambda losses: losses * float("nan"))
        given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", gradient_accumulation_steps=2)
        with pytest.raises(TrainingDivergedError, match=r"at step 1 \(.*There is no checkpoint yet"):
            train(TrainingArguments(**given))
        assert not list((tmp_path / "out").glob("*.safetensors"))

    def test_a_base_with_infinite_weights(self, pipeline_folder, data, tmp_path):
        base = finetune.load_base(pipeline_folder("ddpm"))
        with torch.no_grad():
            base.denoiser.conv_in.weight[0, 0, 0, 0] = torch.inf
        with pytest.raises(TrainingDivergedError, match="The loss became nan at step 1"):
            train(TrainingArguments(**settings(pipeline_folder("ddpm"), data, tmp_path / "out")), base=base)


def fill(folder):
    """Leave no space on the disk."""

    def write():
        with open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with pytest.raises(OSError, match="No space left"):
        write()


@pytest.mark.usefixtures("on_cpu")
class TestFullDisk:
    def test_too_little_space_is_refused_before_training(self, small_disk, pipeline_folder, data):
        disk = small_disk("32k")
        given = settings(pipeline_folder("ddpm"), data, disk / "out")
        with pytest.raises(CheckpointError, match=r"0.0 MB are free in .*out. Two checkpoints need 0.\d MB. Make room"):
            train(TrainingArguments(**given))
        assert not list((disk / "out").iterdir())

    def test_space_that_runs_out_later_costs_no_checkpoint(self, small_disk, pipeline_folder, data, monkeypatch):
        disk = small_disk("2m")
        output_dir = disk / "out"
        save = trainer.save_checkpoint

        def save_and_fill(*args):
            save(*args)
            if not (disk / "filler").exists():
                fill(disk)

        monkeypatch.setattr(trainer, "save_checkpoint", save_and_fill)
        given = settings(pipeline_folder("ddpm"), data, output_dir, max_train_steps=6, checkpointing_steps=2)
        expected = (
            rf"Could not write {output_dir}/checkpoint-4 .*0.0 MB are free.*"
            rf"The last complete checkpoint is {output_dir}/checkpoint-2. Make room, then resume"
        )
        with pytest.raises(CheckpointError, match=expected):
            train(TrainingArguments(**given))
        assert list(checkpoint_steps(output_dir)) == [2]
        assert not list(output_dir.glob(".*"))
        (disk / "filler").unlink()
        monkeypatch.undo()
        train(TrainingArguments(**given, resume_from_checkpoint="latest"))
        assert list(checkpoint_steps(output_dir)) == [2, 4, 6]
        whole = given | {"output_dir": str(data.parent / "whole")}
        train(TrainingArguments(**whole))
        assert (output_dir / "adapter_model.safetensors").read_bytes() == Path(
            whole["output_dir"], "adapter_model.safetensors"
        ).read_bytes()

    def test_no_space_for_the_result(self, small_disk, pipeline_folder, data, monkeypatch):
        disk = small_disk("2m")
        output_dir = disk / "out"
        save = trainer.save_checkpoint
        monkeypatch.setattr(trainer, "save_checkpoint", lambda *args: (save(*args), fill(disk)))
        given = settings(pipeline_folder("ddpm"), data, output_dir, max_train_steps=1)
        with pytest.raises(CheckpointError, match=rf"The last complete checkpoint is {output_dir}/checkpoint-1"):
            train(TrainingArguments(**given))
        assert not list(output_dir.glob(".*"))
        assert not list(output_dir.glob("*.safetensors"))
