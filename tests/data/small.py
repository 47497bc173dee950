"""Small images on disk, each different from all others."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

_images = itertools.count()


def write_image(path: Path, seed: int | None = None) -> Path:
    generator = np.random.default_rng(next(_images) if seed is None else (seed, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(path)
    return path


def write_folders(root: Path, counts: dict[str, int]) -> Path:
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            write_image(root / folder / f"{number:03}.png")
    return root
