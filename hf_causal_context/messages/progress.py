"""What long work says of itself, messages and progress bars, which the command line's `--quiet` leaves out."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm

_SECONDS_BEFORE = 3  # shown only where the wait is felt

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Leave messages and progress bars out from now on, or show them again."""
    global _quiet
    _quiet = quiet


def say(text: str, warnings: str = "") -> None:
    """Print a message that is not the result of a command; of one with warnings, `--quiet` leaves these."""
    if said := warnings if _quiet else text:
        print(said, flush=True)


class ProgressBar(tqdm):
    """tqdm's bar, which estimates the time that is left; it shows after three seconds, unless `delay` says otherwise.

    One that runs beside another, such as a validation's beside its training's, goes away when it is done.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings = {"delay": _SECONDS_BEFORE, "leave": None} | settings
        # Of several processes on a machine, one shows bars.
        if _quiet or os.environ.get("LOCAL_RANK", "0") != "0":
            settings["disable"] = True
        super().__init__(*args, **settings)
