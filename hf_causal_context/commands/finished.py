"""What a training says at its end."""

from __future__ import annotations

import os
from pathlib import Path


def say_where(what: str, folder: Path) -> None:
    """Say where a training left its result; of several processes one says so."""
    if os.environ.get("RANK", "0") == "0":
        print(f"The {what} is in {folder}.")
