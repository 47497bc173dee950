"""The real images of every context, read as samples are."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..bases.images import read_image
from ..contexts import Context
from ..data import InterventionalData
from ..data.columns import Rows
from ..errors import UserValueError
from ..messages.progress import ProgressBar
from .readings import Measurements, Reader

MAX_REAL_ROWS = 2000  # per context; more add time, and little to distances of a few hundred samples

_READ_AT_ONCE = 64


def read_real_rows(
    data: InterventionalData, read: Reader, channels: int, resolution: int, seed: int = 0
) -> dict[Context, Measurements]:
    """Readings of images (N, channels, resolution, resolution) in [0, 1] per context, trained and held out.

    At most `MAX_REAL_ROWS` of each; of a stream the first ones.

    Raises:
        ValueError: for a row without an image.
    """
    readings: defaultdict[str, list[Measurements]] = defaultdict(list)
    pending: defaultdict[str, list[Tensor]] = defaultdict(list)

    def flush(context: str) -> None:
        images = torch.stack(pending.pop(context)).float() / 255
        num_examples = 0 if readings[context] else len(images)
        readings[context].append(read(images, f"Real images of context {context!r}", num_examples))

    for context, row in rows_of_contexts(data, MAX_REAL_ROWS, seed, unit="image"):
        image = row[data.content_column]
        if not isinstance(image, Image.Image):
            raise UserValueError(
                f"A row of context {context!r} holds {type(image).__name__} in the column {data.content_column!r}, "
                "not an image. Name another --image_column, or remove the row."
            )
        pending[context].append(torch.tensor(read_image(image, channels, resolution)))
        if len(pending[context]) == _READ_AT_ONCE:
            flush(context)
    for context in list(pending):
        flush(context)
    return {Context.parse(context): Measurements.cat(parts) for context, parts in readings.items()}


def rows_of_contexts(
    data: InterventionalData, maximum: int, seed: int, unit: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Contexts, trained and held out, each with some of its rows; of a stream the first ones. With a progress bar."""
    parts = [(data.rows, data.contexts), *((own, (context,)) for context, own in data.held_out.items())]
    rows = chain.from_iterable(_rows_of(own, contexts, maximum, seed) for own, contexts in parts)
    sizes = [*(data.counts or {}).values(), *(len(own) for own in data.held_out.values() if isinstance(own, Dataset))]
    total = sum(min(maximum, size) for size in sizes) or None
    yield from ProgressBar(rows, total=total, desc=f"read real {unit}s", unit=unit)


def _rows_of(rows: Rows, contexts: Sequence[str], maximum: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(rows, Dataset):
        of_rows = np.array(rows["context"][:], dtype=object)
        for context in contexts:
            numbers = np.random.default_rng(seed).permutation(np.flatnonzero(of_rows == context))
            for row in rows.select(numbers[:maximum]):
                yield context, dict(row)
        return
    counts = Counter[str]()
    for row in rows:
        context = row["context"]
        if counts[context] < maximum:
            counts[context] += 1
            yield context, row
        elif all(counts[name] == maximum for name in contexts):
            return
