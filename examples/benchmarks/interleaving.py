"""Times variants beside each other: each in a process of its own, its timed rounds interleaved with the others'.

So each has a peak of memory of its own, and noise of the machine falls on all of them alike.
"""

from __future__ import annotations

import multiprocessing as mp
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleaved(
    worker: Callable[..., None], variants: Mapping[str, tuple[Any, ...]], rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, float]]]:
    """Return the seconds of each variant's kinds of work in each round, and what its worker says at the end.

    Args:
        worker: takes a variant's arguments and a pipe. It sends the names of its kinds of work when it is ready, then
            the seconds of the one whose name it receives, and its last words after "stop".
        variants: name -> arguments.
        rounds: how often each is timed.
    """
    context = mp.get_context("spawn")
    pipes, processes, work = {}, [], {}
    for variant, arguments in variants.items():
        pipes[variant], child = context.Pipe()
        process = context.Process(target=worker, args=(*arguments, child), daemon=True)
        process.start()
        child.close()  # so that a dead worker shows as EOFError
        processes.append(process)
        work[variant] = pipes[variant].recv()  # built one after the other
    seconds: dict[str, dict[str, list[float]]] = {v: {w: [] for w in work[v]} for v in variants}
    names = list(variants)
    for index in range(rounds):
        # The order rotates, so that no variant always runs after the same one.
        for variant in names[index % len(names) :] + names[: index % len(names)]:
            for name in work[variant]:
                pipes[variant].send(name)
                seconds[variant][name].append(pipes[variant].recv())
    results = {}
    for variant in variants:
        pipes[variant].send("stop")
        results[variant] = pipes[variant].recv()
    for process in processes:
        process.join()
    return seconds, results


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(values, reference, strict=True))


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
