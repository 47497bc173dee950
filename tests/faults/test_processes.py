"""Several processes: they train as one, share the rows without repeats or gaps, and none waits for one that is gone."""

import itertools
import re
import time
from collections import Counter
from signal import SIGKILL, SIGTERM

import pytest

from hf_causal_context._files import checkpoint_steps

from ..training.run_tiny import Faults
from ..training.small import adapter_weights, assert_close_to_largest, settings, write_folders
from ..training.test_faults import assert_same_run

IMAGES = {"obs": 5, "slant": 3, "thick": 4}  # none is a multiple of what is drawn in a step
LOST = (
    r"ProcessLostError: Another process of this run has failed, was killed or does not answer \(Connection .*\)\. "
    r"{last} What that process printed says why.* with --resume_from_checkpoint latest"
)


@pytest.fixture
def data(tmp_path):
    root = write_folders(tmp_path / "data", IMAGES, max(IMAGES.values()))
    for context, number in IMAGES.items():
        for path in sorted((root / context).iterdir())[number:]:
            path.unlink()
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_four_processes_train_as_one_on_the_same_rows(streaming, start, together, pipeline_folder, data, tmp_path):
    given = settings(
        pipeline_folder("ddpm"),
        data,
        tmp_path / "four",
        train_batch_size=1,
        gradient_accumulation_steps=2,
        max_train_steps=4,
        adam_epsilon=1e-3,
        use_ema=True,
        streaming=streaming,
    )
    seen = [tmp_path / f"seen-{name}" for name in ("0", "1", "2", "3", "one")]
    four = together(given, 4, {rank: Faults(seen_file=str(seen[rank])) for rank in range(4)})
    whole = {"output_dir": str(tmp_path / "one"), "train_batch_size": 8, "gradient_accumulation_steps": 1}
    one = start(given | whole, Faults(seen_file=str(seen[-1])))
    assert [run.wait() for run in (*four, one)] == [given["output_dir"]] * 4 + [whole["output_dir"]]
    assert_close_to_largest(adapter_weights(tmp_path / "four"), adapter_weights(tmp_path / "one"))

    *apart, expected = ([line.split() for line in path.read_text().splitlines()] for path in seen)
    assert [len(batches) for batches in apart] == [8] * 4
    # In the order of the slots: micro-batch after micro-batch, in each process after process.
    rows = [row for micro_batch in zip(*apart, strict=True) for batch in micro_batch for row in batch]
    assert rows == list(itertools.chain(*expected))
    # 32 slots are 10 or 11 of each context: 5 images come twice or three times, 4 at most three, 3 at most four.
    counts = Counter(rows)
    assert len(counts) == sum(IMAGES.values())
    assert set(counts.values()) == {2, 3, 4}


@pytest.mark.parametrize(
    ("victim", "fault"),
    [
        (1, Faults(signal_in_microbatch=(7, SIGKILL))),
        (0, Faults(signal_after_step=(3, SIGKILL))),
        (0, Faults(kill_while_saving=4)),
    ],
    ids=["within a step", "the main process", "within a checkpoint"],
)
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(
    victim, fault, together, pipeline_folder, data, tmp_path
):
    changes = {"train_batch_size": 2, "max_train_steps": 6, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "whole", use_ema=True, **changes)
    whole = together(given, 2)
    killed = given | {"output_dir": str(tmp_path / "killed"), "resume_from_checkpoint": "latest"}
    runs = together(killed, 2, {victim: fault})
    assert runs[victim].wait() is None
    begin = time.monotonic()
    last = f"The last complete checkpoint is {tmp_path}/killed/checkpoint-2."
    assert re.match(LOST.format(last=re.escape(last)), runs[1 - victim].wait())
    assert time.monotonic() - begin < 20
    assert list(checkpoint_steps(tmp_path / "killed")) == [2]
    assert [run.wait() for run in together(killed, 2)] == [killed["output_dir"]] * 2
    assert [run.wait() for run in whole] == [given["output_dir"]] * 2
    assert_same_run(killed["output_dir"], given["output_dir"])


def test_a_signal_to_one_process_stops_all_after_the_same_step(together, pipeline_folder, data, tmp_path):
    changes = {"train_batch_size": 2, "max_train_steps": 16, "checkpointing_steps": 100, "use_ema": True}
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "whole", lr_scheduler="cosine", **changes)
    whole = together(given, 2)
    output_dir = tmp_path / "stopped"
    stopped = given | {"output_dir": str(output_dir), "resume_from_checkpoint": "latest"}
    said = {run.wait() for run in together(stopped, 2, {1: Faults(signal_after_step=(3, SIGTERM))})}
    (step,) = checkpoint_steps(output_dir)
    assert 3 <= step <= 13  # they agree on it within ten steps
    assert said == {
        f"TrainingInterrupted: Stopped after step {step} of 16. The last complete checkpoint is "
        f"{output_dir}/checkpoint-{step}. Go on by running the same command again."
    }
    assert [run.wait() for run in together(stopped, 2)] == [stopped["output_dir"]] * 2
    assert [run.wait() for run in whole] == [given["output_dir"]] * 2
    assert_same_run(output_dir, given["output_dir"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_goes_on_with_other_processes_if_its_steps_have_as_many_rows(
    streaming, start, together, pipeline_folder, data, tmp_path
):
    changes = {"use_ema": True, "adam_epsilon": 1e-3, "checkpointing_steps": 2, "streaming": streaming}
    changes["observational_steps"] = 1
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", **changes, resume_from_checkpoint="latest")
    runs = together(given | {"train_batch_size": 2, "max_train_steps": 2}, 2)
    assert [run.wait() for run in runs] == [given["output_dir"]] * 2
    other = given | {"train_batch_size": 2, "max_train_steps": 4}
    expected = "processes: '2 x 1 x 2' then, '2 x 1 x 1' now). Resume with the same ones, or start anew"
    assert expected in start(other).wait()
    assert start(other | {"gradient_accumulation_steps": 2}).wait() == given["output_dir"]
    runs = together(given | {"train_batch_size": 1, "max_train_steps": 6}, 4)
    assert [run.wait() for run in runs] == [given["output_dir"]] * 4
    whole = given | {"output_dir": str(tmp_path / "whole"), "train_batch_size": 4, "max_train_steps": 6}
    assert start(whole).wait() == whole["output_dir"]
    assert_close_to_largest(adapter_weights(tmp_path / "out"), adapter_weights(tmp_path / "whole"))


def test_one_of_four_processes_ends_the_three_others(together, pipeline_folder, data, tmp_path):
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", train_batch_size=1, max_train_steps=50)
    runs = together(given, 4, {2: Faults(signal_in_microbatch=(3, SIGKILL))})
    said = [run.wait() for run in runs]
    assert said.pop(2) is None
    assert all(re.match(LOST.format(last="There is no checkpoint yet."), message) for message in said), said


def test_a_main_process_that_fails_before_the_training_ends_the_others(together, pipeline_folder, data, tmp_path):
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", train_batch_size=1)
    main, other = together(given, 2, {0: Faults(fail_first=True)})
    assert main.wait() == "RuntimeError: no batches"
    assert other.wait().startswith("ProcessLostError: Another process of this run has failed, was killed or does not")
    assert "(it failed before the training). There is no checkpoint yet." in other.wait()


def test_a_process_ends_when_the_main_process_refuses_the_data(together, pipeline_folder, data, tmp_path):
    (data / "thick" / "1.png").write_bytes(b"no image")
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "out", train_batch_size=1)
    main, other = together(given, 2)
    assert re.match("UserValueError: The data cannot be trained on:\n- .*thick/1.png", main.wait())
    assert re.match(LOST.format(last="There is no checkpoint yet."), other.wait())
