"""What a run trains on, kept beside it: contexts and how many rows they have, not the rows; for cards and resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from .._files import DATA_RECORD, read_json
from ..data import InterventionalData
from ..messages.progress import say
from .loop.checkpoints import write_text


def tell_changed_data(counts: Mapping[str, int] | None, digest: str, earlier: Path | None) -> None:
    """Say that the data is not what an earlier run, which is gone on with, was trained on, where that is known.

    Args:
        counts: rows of each context that is trained on now; None for a stream.
        digest: of what is trained on now.
        earlier: folder of that run.
    """
    record = {} if earlier is None else read_json(earlier / DATA_RECORD)
    if record.get("digest", digest) == digest:  # older records have none
        return
    then, now = (
        ", ".join(f"{c or 'obs'}: {n}" for c, n in sorted((rows or {}).items())) for rows in (record["trained"], counts)
    )
    how = f"rows then: {then}; now: {now}" if then != now else "as many rows, but others, or in another order"
    said = (
        f"Warning: the data is not what this run was trained on until now ({how}). It goes on, but not as a run that "
        "was never interrupted would. Put back what was there, or start anew in another --output_dir, unless that is "
        "meant."
    )
    say(said, said)


def record_data(data: InterventionalData, digest: str, folder: Path, self_composed: Mapping[str, int]) -> None:
    """Write training_data.json: rows per context, and which were held out, drawn from others, or the adapter's own.

    `digest`: of the report on the data.
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
        "digest": digest,
    }
    _write(record, folder)


def record_images(counts: Mapping[str, int], digest: str, folder: Path) -> None:
    """Write training_data.json of an autoencoder, which is given no more than rows per context and their digest.

    Raises:
        CheckpointError: when it cannot be written.
    """
    _write({"trained": dict(counts), "digest": digest}, folder)


def _write(record: Mapping[str, Any], folder: Path) -> None:
    write_text(folder / DATA_RECORD, folder, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
