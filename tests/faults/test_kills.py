"""SIGKILL at random moments, checkpoint writing included: no checkpoint is lost, and the end is the same."""

import os
import random
import sys
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from safetensors.torch import load_file

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop import trainer
from hf_causal_context.training.loop.corruption import find_corruption

from ..training.run_tiny import Faults
from ..training.small import settings, write_folders
from ..training.test_faults import assert_same_run

KILLS = 10  # in each of two runs
STEPS = 24


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 2])  # of checkpoints
def test_kills_at_random_moments_change_nothing(limit, start, pipeline_folder, tmp_path):
    random.seed(limit)
    given = settings(
        pipeline_folder("ddpm"),
        write_folders(tmp_path / "data"),
        tmp_path / "whole",
        max_train_steps=STEPS,
        checkpointing_steps=1,
        checkpoints_total_limit=limit,
        train_batch_size=1,
        use_ema=True,
        lr_scheduler="cosine",
    )
    calls_file = tmp_path / "calls"
    assert start(given, Faults(calls_file=str(calls_file))).wait() == given["output_dir"]
    calls, in_saving = (int(number) // STEPS for number in calls_file.read_text().split())
    output_dir = tmp_path / "killed"
    killed = given | {"output_dir": str(output_dir), "resume_from_checkpoint": "latest"}
    complete, unfinished = set(), 0
    for number in range(KILLS):
        # Every other kill within a checkpoint; the others within resuming or the three steps after it
        # (`fit` begins with `watched_processes`).
        where, most = ("save_checkpoint", in_saving) if number % 2 else ("watched_processes", 4 * calls)
        run = start(killed, Faults(kill_at_call=(where, random.randint(1, most))))
        assert run.wait() is None
        assert run.process.exitcode == -SIGKILL
        unfinished += bool(list(output_dir.glob(".checkpoint-*")))
        found = checkpoint_steps(output_dir)
        assert complete <= set(found) if limit is None else len(found) >= min(limit, len(complete))
        assert max(complete, default=0) <= max(found, default=0)
        for folder in found.values():
            assert_loads(folder)
        complete = set(found)
    assert unfinished >= 2
    assert start(killed).wait() == str(output_dir)
    assert_same_run(output_dir, given["output_dir"])
    assert not list(output_dir.glob(".*"))


@pytest.mark.parametrize("calls", [60, 120])
@pytest.mark.slow
def test_a_kill_while_an_old_checkpoint_is_removed_leaves_none_that_is_half_removed(
    calls, start, pipeline_folder, tmp_path
):
    data = write_folders(tmp_path / "data")
    changes = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", resume_from_checkpoint="latest", **changes)
    assert start(given, Faults(kill_at_call=("remove_checkpoint", calls))).wait() is None
    assert list(checkpoint_steps(tmp_path / "out")) == [2]
    assert_loads(tmp_path / "out" / "checkpoint-2")
    assert (tmp_path / "out" / ".checkpoint-1.removed").exists()
    assert start(given).wait() == given["output_dir"]
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.usefixtures("on_cpu")
def test_at_no_call_within_saving_is_a_checkpoint_half_there(pipeline_folder, tmp_path, monkeypatch):
    save, output_dir, states = trainer.save_checkpoint, tmp_path / "out", {}

    def look(frame, event, arg):
        if event != "c_call":  # files change in C
            return
        found = [name for name in os.listdir(output_dir) if name.startswith("checkpoint-")]
        assert not states or found  # the last one goes when the next is there
        for name in found:
            files = frozenset((path.name, path.stat().st_size) for path in os.scandir(output_dir / name))
            states.setdefault(name, set()).add(files)

    def watched(*args):
        sys.setprofile(look)  # it does not see its own calls
        try:
            return save(*args)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(trainer, "save_checkpoint", watched)
    changes = {"max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "use_ema": True}
    train(
        TrainingArguments(**settings(pipeline_folder("ddpm"), write_folders(tmp_path / "data"), output_dir, **changes))
    )
    assert list(states) == ["checkpoint-1", "checkpoint-2"]
    assert all(len(seen) == 1 for seen in states.values())
    assert_loads(output_dir / "checkpoint-2")


def assert_loads(folder: Path):
    assert find_corruption(folder) is None
    assert load_file(folder / "adapter_model.safetensors")
    for path in (*folder.glob("*.bin"), *folder.glob("custom_checkpoint_*.pkl")):
        torch.load(path, weights_only=True)
