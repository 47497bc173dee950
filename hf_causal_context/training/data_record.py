"""What an adapter was trained on, kept beside it for its card: contexts and their rows, not the rows themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from .._files import DATA_RECORD
from ..data import InterventionalData
from .loop.checkpoints import write_file


def record_data(data: InterventionalData, folder: Path, self_composed: Mapping[str, int]) -> None:
    """Write training_data.json: rows per context, and which were held out, drawn from others, or the adapter's own.

    `self_composed`: how many texts of each combination the adapter wrote in the last round of its training.
    Counts of streams are null. "chat" says whether texts are messages.

    Raises:
        CheckpointError: when it cannot be written.
    """
    counts = data.counts or dict.fromkeys(data.contexts)
    held_out = {name: len(rows) if isinstance(rows, Dataset) else None for name, rows in data.held_out.items()}
    texts = data.content_column != "image" and next(iter(data.rows))[data.content_column]
    record: dict[str, Any] = {
        "chat": isinstance(texts, list),
        "trained": counts,
        "held_out": held_out,
        "reweighted": {name: len(rows) for name, rows in data.reweighted.items()},
        "self_composed": dict(self_composed),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_file(folder / DATA_RECORD, folder, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
