"""Interrupted training goes on exactly where it stopped: Ctrl-C in the middle, then the same weights as without it.

    python -m examples.resume --output_dir resumed

The interrupted run saves a checkpoint and says how to go on; so does one that gets SIGTERM, as on preempted machines.
After SIGKILL the latest `checkpoint-N` serves the same way.
"""

import argparse
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_causal_context.quickstart import digit_data, training_arguments
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop.trainer import TrainingInterrupted


def settings(folder: Path, steps: int, resume: str | None = None) -> TrainingArguments:
    changes: dict[str, Any] = {"max_train_steps": steps, "train_batch_size": 10, "checkpointing_steps": 4}
    changes |= {"checkpoints_total_limit": None, "resume_from_checkpoint": resume}
    return dataclasses.replace(training_arguments(folder, seed=0), **changes)


def press_control_c(when: Path) -> None:
    while not when.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=12)
    arguments = parser.parse_args()
    steps, data = arguments.max_train_steps, digit_data(rows_per_context=60)
    whole = train(settings(arguments.output_dir / "whole", steps), data=data)

    interrupted = arguments.output_dir / "interrupted"
    threading.Thread(target=press_control_c, args=(interrupted / "checkpoint-4",), daemon=True).start()
    try:
        train(settings(interrupted, steps), data=data)
    except TrainingInterrupted as message:
        print(message)
        train(settings(interrupted, steps, resume="latest"), data=data)

    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, interrupted))
    print("identical weights:", all(torch.equal(one[name], other[name]) for name in one))


if __name__ == "__main__":
    main()
