"""How a run begins: on the observational set alone, so that the concepts find learned what the data differs by.

Otherwise they learn some of that difference too while the observational part is not yet there, and a combination adds
it once per concept. Measured in the vector world with a gap (`examples/benchmarks/composition.py`).
"""

from __future__ import annotations

import dataclasses
import json
from typing import TypeVar

from .._files import ARGUMENTS
from ..errors import UserValueError
from .arguments import OLDER_RUNS, AdapterArguments
from .loop.checkpoints import earlier_run
from .weights import parse_weights

SHARE = 0.2  # of the run's steps; 0.4 was no better

AnyArguments = TypeVar("AnyArguments", bound=AdapterArguments)


def settle_observational_steps(arguments: AnyArguments, num_steps: int) -> AnyArguments:
    """Return the arguments with a number of observational steps; a resumed run goes on as it began.

    Raises:
        ValueError: what `check_observational_set` raises, with the number of steps known.
    """
    check_observational_set(arguments)
    if arguments.observational_rank == 0:
        return dataclasses.replace(arguments, observational_steps=0)
    steps = arguments.observational_steps
    if steps is None:
        steps = _steps_of_resumed_run(arguments)
    if steps is None:
        steps = int(SHARE * num_steps)
    _check_room(steps, num_steps)
    return dataclasses.replace(arguments, observational_steps=steps)


def check_observational_set(arguments: AdapterArguments) -> None:
    """Refuse an observational part that would have nothing to learn from, or leave no steps, before anything is loaded.

    Raises:
        ValueError: for such settings.
    """
    if arguments.observational_rank == 0:
        return
    if arguments.observational_steps is not None and arguments.max_train_steps is not None:
        _check_room(arguments.observational_steps, arguments.max_train_steps)
    weights = parse_weights(arguments.context_weights, arguments.observational_name)
    if weights.get("") == 0:
        name = arguments.observational_name
        raise UserValueError(
            f"--context_weights {name}=0 leaves out the observational set, so the observational part could not be told "
            f"from the concepts. Leave {name}=0 out, or the part: --observational_rank 0."
        )


def _check_room(steps: int, num_steps: int) -> None:
    if steps >= num_steps:
        raise UserValueError(
            f"--observational_steps={steps} of {num_steps} steps leave none for the concepts. Lower it, or train more."
        )


def observational_samples(arguments: AdapterArguments, num_processes: int) -> int:
    """How many samples of a run with settled arguments come first, all of them observational."""
    samples = arguments.train_batch_size * arguments.gradient_accumulation_steps * num_processes
    return (arguments.observational_steps or 0) * samples


def _steps_of_resumed_run(arguments: AdapterArguments) -> int | None:
    folder = earlier_run(arguments)
    if folder is None or not (folder / ARGUMENTS).is_file():  # `fit` says what is wrong with it
        return None
    stored = json.loads((folder / ARGUMENTS).read_text())
    return stored.get("observational_steps", OLDER_RUNS["observational_steps"])
