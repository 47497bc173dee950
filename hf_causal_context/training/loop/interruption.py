"""Ctrl-C and SIGTERM, noted and left to the training loop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Which signal came, if any; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextmanager
def noted_interruptions() -> Iterator[Interruption]:
    """Within the body, SIGINT and SIGTERM only set `signal`; in other threads than the main one nothing changes."""
    interruption = Interruption()
    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, interruption.note)
    except ValueError:
        pass  # Python allows handlers in the main thread only
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_interruptions(worker: int = 0) -> None:
    """Make a data loader's process (its `worker_init_fn`) leave SIGINT and SIGTERM to the training loop.

    Ctrl-C and batch systems signal the whole group; a loader that died would end the run before it has saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
