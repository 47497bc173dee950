"""What earlier runs left in a folder: the card of this run's adapter would show it as its own."""

from __future__ import annotations

import itertools
from pathlib import Path

from .._files import BASE_GAP, RESULTS, RESULTS_IMAGE
from ..messages.progress import say
from .context_losses import LOSSES
from .loop.checkpoints import writing

_OF_RUNS = ("samples/step-*", BASE_GAP, LOSSES)
# Measured of an adapter when it was finished.
_OF_ADAPTERS = ("evaluation/report.*", "evaluation/samples.png", RESULTS, RESULTS_IMAGE)


def set_aside(folder: Path, earlier: Path | None) -> None:
    """Move what was measured of another adapter than the one that is trained now, and what another run showed.

    Args:
        folder: of the run that is about to take its first step.
        earlier: of the run that it goes on with, if there is one.

    Raises:
        CheckpointError: where it cannot be moved.
    """
    goes_on_here = earlier is not None and earlier.resolve() == folder.resolve()
    patterns = _OF_ADAPTERS if goes_on_here else (*_OF_RUNS, *_OF_ADAPTERS)
    if not (found := [path for pattern in patterns for path in sorted(folder.glob(pattern))]):
        return
    place = next(path for number in itertools.count(1) if not (path := folder / f"earlier-{number}").exists())
    with writing(place, folder):
        for path in found:
            there = place / path.relative_to(folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            path.rename(there)
    said = f"What belongs to an earlier adapter in {folder}, such as {found[0].name}, is now in {place}."
    say(said, said)
