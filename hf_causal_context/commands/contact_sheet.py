"""Images of every context side by side, to look at before a training."""

from __future__ import annotations

from typing import Any, cast

import torch
from PIL import Image, ImageOps

from ..bases.images import image_grid, read_image
from ..data import InterventionalData
from ..media.pixels import plain
from ..media.videos import frames
from ..training.few_rows import few_rows

NUM_IMAGES = 8
_SIDE = 128


def contact_sheet(data: InterventionalData, observational_name: str) -> Image.Image:
    """Return an image with a row for each context, those held out too: some of its images, drawn at random.

    A video is shown by its first frame.
    """
    contexts = (*data.contexts, *data.held_out)
    contents = [
        [cast(Any, row)[data.content_column] for row in few_rows(data, context, NUM_IMAGES, seed=0)]
        for context in contexts
    ]
    filled = [
        (torch.stack([_tensor(next(frames(content))) for content in row]), context or observational_name)
        for row, context in zip(contents, contexts, strict=True)
        if row
    ]
    return image_grid([row for row, _ in filled], [label for _, label in filled])


def _tensor(image: Image.Image) -> torch.Tensor:
    """Return an image of any kind as (3, H, W) in [0, 1], whole, on a white square."""
    square = ImageOps.pad(plain(image).convert("RGB"), (_SIDE, _SIDE), color="white")
    return torch.from_numpy(read_image(square, 3, _SIDE)) / 255
