"""Rows per second of balanced, resumable batches beside what `datasets` gives alone, on 64 x 64 PNG files.

    python -m examples.benchmarks.loader

Every row is decoded, without worker processes. `datasets` alone reads the same rows in batches of the same size, in
order and shuffled; the median of the rounds' ratios is printed, the readers take turns within a round.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from hf_causal_context.data import ContextSampler, load_folders, stream_batches

CONTEXTS = ("obs", "a", "b", "c")


def draw_images(root: Path, per_context: int) -> None:
    rng = np.random.default_rng(0)
    for name in CONTEXTS:
        (root / name).mkdir()
        for i in range(per_context):
            # Smooth noise compresses about as well as a photograph of this size.
            small = Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8))
            small.resize((64, 64), Image.Resampling.BICUBIC).save(root / name / f"{i}.png")


def rate(read: Callable[[], Iterator[Any]], num_batches: int, batch_size: int) -> float:
    start = time.perf_counter()
    for _, batch in zip(range(num_batches), read(), strict=False):
        assert batch
    return num_batches * batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows_per_context", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder), arguments.rows_per_context)
        data, stream = load_folders(folder), load_folders(folder, streaming=True)
        rows: Any = data.rows
        print("| batch | rows/s, datasets in order | ours / in order | ours / shuffled | stream / in order |")
        print("|---|---|---|---|---|")
        for size in (4, 16, 64):
            count = len(rows) // size
            shuffled = rows.shuffle(seed=0)

            def ours(size: int = size, count: int = count) -> Iterator[Any]:
                sampler = ContextSampler(rows["context"], size, 0, count)
                return iter(DataLoader(cast(Any, rows), batch_sampler=sampler, collate_fn=list))

            readers: dict[str, Callable[[], Iterator[Any]]] = {
                "order": lambda size=size: rows.iter(size),
                "shuffled": lambda size=size, shuffled=shuffled: shuffled.iter(size),
                "ours": ours,
                "stream": lambda size=size: stream_batches(stream, size, 0),
            }
            rounds = [
                {name: rate(read, count, size) for name, read in readers.items()} for _ in range(arguments.rounds)
            ]
            ratios = [
                statistics.median(r[one] / r[other] for r in rounds)
                for one, other in (("ours", "order"), ("ours", "shuffled"), ("stream", "order"))
            ]
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {size} | {statistics.median(r['order'] for r in rounds):.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
