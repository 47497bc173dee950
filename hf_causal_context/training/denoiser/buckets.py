"""Aspect-ratio buckets: images keep about their shape, and a batch has one, that of its bucket.

Of each context, every row is drawn as often as any other, as without buckets; so are the shares of contexts in the run.
A batch holds the contexts in the shares that they have in its bucket.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image

from ...data import ContextSampler, slots_of
from ...data.sampling import schedule, shares_of
from ...media.pixels import upright_size
from ...messages.progress import ProgressBar
from ...messages.wording import quoted

Size = tuple[int, int]  # width, height

_MOST = 2  # times the resolution, of a side
_STEPS = 16  # of the resolution, between the sides of buckets


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Return sizes of about resolution^2 pixels, from 1:4 to 4:1, the square among them; sides are multiples."""
    step = max(1, round(resolution / _STEPS / multiple)) * multiple

    def nearest(side: float) -> int:
        return resolution + round((side - resolution) / step) * step

    sides = range(nearest(resolution / _MOST), _MOST * resolution + 1, step)
    pairs = [(side, nearest(resolution**2 / side)) for side in sides if side > 0]
    return sorted({size for a, b in pairs if b > 0 for size in ((a, b), (b, a))})


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> int:
    """Return the number of the bucket that an image loses least in."""

    def distance(bucket: Size) -> tuple[float, int]:
        return abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))), -bucket[0] * bucket[1]

    return min(range(len(sizes)), key=lambda number: distance(sizes[number]))


def upright_sizes(rows: Dataset, image_column: str) -> Iterator[Size]:
    """Sizes of the images of rows as one sees them; the images are not decoded."""
    images = rows.with_format(None).select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    for row in ProgressBar(images, desc="look at sizes"):
        value = row[image_column]  # type: ignore[index, call-overload]
        with Image.open(value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"])) as image:
            size = upright_size(image)
        yield size


def told(buckets: Sequence[tuple[Size, NDArray[np.int64]]], contexts: Sequence[str], batch_size: int) -> str:
    """Say how many rows are in each bucket, and what is doubtful about that.

    Args:
        buckets: their sizes and the numbers of their rows.
        contexts: of all rows.
        batch_size: samples of all processes.
    """
    lines = ["Buckets, width x height:"]
    for (width, height), numbers in buckets:
        here = Counter(contexts[number] for number in numbers)
        doubts = ["less than a batch, so it repeats them"] if len(numbers) < batch_size else []
        if missing := sorted(set(contexts) - set(here)):
            doubts.append(f"none of {quoted(missing)}, whose difference from the others then has this shape in it")
        lines.append(f"  {width} x {height}: {len(numbers)} images" + "".join(f"; {doubt}" for doubt in doubts))
    return "\n".join(lines)


class BucketSampler:
    """Batch sampler like `ContextSampler`, whose batches have rows of one bucket each.

    All processes are in the same bucket at the same time, and the number of a batch alone says in which.

    Args:
        buckets: number of the bucket of each row.
        contexts: of each row.
        batch_size, seed, num_batches, start, rank, world_size, weights, num_observational: see `ContextSampler`.
    """

    def __init__(
        self,
        buckets: NDArray[np.int64],
        contexts: Sequence[str],
        batch_size: int,
        seed: int,
        num_batches: int,
        start: int,
        rank: int,
        world_size: int,
        weights: Mapping[str, float],
        num_observational: int,
    ) -> None:
        self._size, self._num_batches, self.start, self._place = batch_size, num_batches, start, (rank, world_size)
        names, codes = np.unique(np.array(contexts, dtype=object).astype(str), return_inverse=True)
        counts = np.zeros((len(names), buckets.max() + 1))
        np.add.at(counts, (codes, buckets), 1)
        shares = counts / counts.sum(1, keepdims=True)  # of the buckets, in each context
        joint = shares * shares_of(names.tolist(), weights)[:, None]
        self._shares = joint.sum(0)
        self._begin = num_observational // (batch_size * world_size)
        self._first_shares = shares[names.tolist().index("")] if num_observational else self._shares
        first, _ = schedule(self._first_shares, 0, self._begin)
        self._first_counts = np.bincount(first, minlength=len(self._shares))
        self._rows: dict[int, NDArray[np.int64]] = {}
        self._samplers: dict[int, ContextSampler] = {}
        for bucket in np.flatnonzero(self._shares).tolist():
            self._rows[bucket] = np.flatnonzero(buckets == bucket)
            self._samplers[bucket] = ContextSampler(
                [contexts[int(row)] for row in self._rows[bucket]],
                batch_size,
                seed,
                num_batches,
                0,
                rank,
                world_size,
                {name: joint[i, bucket] for i, name in enumerate(names.tolist()) if counts[i, bucket]},
                int(self._first_counts[bucket]) * batch_size * world_size,
            )

    def slots(self, batch: int) -> range:
        """Return the slots of micro-batch number `batch` of this process."""
        return slots_of(batch, self._size, *self._place)

    def place(self, batch: int) -> tuple[int, int]:
        """Return the bucket of micro-batch number `batch`, and its number among those of the bucket."""
        if batch < self._begin:
            (bucket,), (number,) = schedule(self._first_shares, batch, batch + 1)
            return int(bucket), int(number)
        (bucket,), (number,) = schedule(self._shares, batch - self._begin, batch - self._begin + 1)
        return int(bucket), int(number + self._first_counts[bucket])

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self._num_batches):
            bucket, number = self.place(batch)
            yield self._rows[bucket][self._samplers[bucket].rows(self.slots(number))].tolist()
