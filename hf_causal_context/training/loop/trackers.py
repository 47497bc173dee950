"""Trackers that cannot stop a training: what they raise is said once, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..optimization_arguments import OptimizationArguments
from .checkpoints import last_checkpoint


class ForgivingTracker:
    """A tracker whose methods raise nothing.

    Args:
        tracker: one of Accelerate's.
        say: is told the first error.
    """

    def __init__(self, tracker: Any, say: Callable[[Exception], object]) -> None:
        self._tracker, self._say, self._said = tracker, say, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._tracker, name)
        return self._forgiving(found) if callable(found) else found

    def _forgiving(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except Exception as error:  # trackers raise whatever their servers and disks make them raise
                if not self._said:
                    self._say(error)
                self._said = True
                return None

        return call


def start_trackers(accelerator: Accelerator, arguments: OptimizationArguments) -> None:
    """Start the trackers that `arguments` name; without them if they cannot be started."""
    if not arguments.report_to:
        return

    def say(error: Exception, consequence: str = "what it shows will be incomplete") -> None:
        accelerator.print(
            f"The tracker {arguments.report_to} failed ({type(error).__name__}: {error}). Training goes on; "
            f"{consequence}. {last_checkpoint(Path(arguments.output_dir))} Further failures are not shown. Mend its "
            "connection or disk for the next run, or leave --report_to out."
        )

    settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(arguments).items()}
    try:
        accelerator.init_trackers("hf_causal_context", settings)
    except Exception as error:  # see above
        accelerator.trackers = []
        say(error, "nothing will be logged")
    accelerator.trackers = [ForgivingTracker(tracker, say) for tracker in accelerator.trackers]
