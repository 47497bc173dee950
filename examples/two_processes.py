"""Several processes share every batch: the same adapter as one process with the whole batch.

    torchrun --nproc_per_node 2 -m examples.two_processes --output_dir shared     # two CPU processes
    accelerate launch -m examples.two_processes --output_dir shared               # the GPUs that accelerate knows

`accelerate launch --cpu --num_processes 2` silently runs one process; torchrun does what it says.
"""

import argparse
import dataclasses
from pathlib import Path

from hf_causal_context.quickstart import digit_data, training_arguments
from hf_causal_context.training.finetune import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=10)
    arguments = parser.parse_args()
    settings = dataclasses.replace(
        training_arguments(arguments.output_dir, seed=0),
        train_batch_size=10,  # per process
        max_train_steps=arguments.max_train_steps,
    )
    train(settings, data=digit_data(rows_per_context=60))


if __name__ == "__main__":
    main()
