"""Images as tensors and as files, and grids of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..errors import UserValueError
from ..media.pixels import plain
from ..media.videos import first_frames

_MARGIN = 4
_SHOWN_FRAMES = 5

_SMALLEST_SIDE = 64
_HEADING = 26


def image_grid(rows: Sequence[Tensor], labels: Sequence[str], scale: int | None = None) -> Image.Image:
    """Return an image with one labeled row for each tensor (S, C, H, W) in [0, 1], gray or RGB.

    Args:
        rows: (S, C, H, W) each, of one size, or clips (S, F, C, H, W), which become strips.
        labels: one for each row.
        scale: enlargement, each pixel becoming a square; if None, images get at least 64 pixels wide and high.

    Raises:
        ValueError: for rows that do not match the labels or each other, or that hold no gray or RGB images.
    """
    rows = [strips(row) if row.ndim == 5 else row for row in rows]
    shapes = {tuple(row.shape[1:]) for row in rows}
    if (
        len(rows) != len(labels)
        or len(shapes) != 1
        or not all(row.ndim == 4 and row.shape[1] in (1, 3) for row in rows)
    ):
        raise UserValueError(
            f"Rows of shapes {[tuple(row.shape) for row in rows]} with {len(labels)} labels make no grid. Give one "
            "label for each row, and rows (images, 1 or 3, height, width) of one size."
        )
    ((_, height, width),) = shapes
    scale = scale or math.ceil(_SMALLEST_SIDE / min(height, width))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(size=min(32, max(14, height // 8)))
    label_width = _MARGIN + math.ceil(max(font.getlength(label) for label in labels)) + 2 * _MARGIN
    columns = max(len(row) for row in rows)
    size = (label_width + columns * (width + _MARGIN), len(rows) * (height + _MARGIN) + _MARGIN)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = _MARGIN + i * (height + _MARGIN)
        draw.text((_MARGIN, top + height / 2), label, fill="black", font=font, anchor="lm")
        for j, image in enumerate(row):
            image = to_image(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(image, (label_width + j * (width + _MARGIN), top))
    return grid


def side_by_side(
    left: Sequence[Tensor], right: Sequence[Tensor], labels: Sequence[str], titles: tuple[str, str]
) -> Image.Image:
    """Return two grids beside each other, with a title each; a label is that of a row (S, C, H, W) in both."""
    grids = image_grid(left, labels), image_grid(right, [""] * len(right))
    width, height = sum(grid.width for grid in grids), max(grid.height for grid in grids)
    both = Image.new("RGB", (width, height + _HEADING), "white")
    draw, font = ImageDraw.Draw(both), ImageFont.load_default(size=16)
    end = 0
    for grid, title in zip(grids, titles, strict=True):
        both.paste(grid, (end, _HEADING))
        end += grid.width
        draw.text((end - 6, _HEADING / 2), title, fill="black", font=font, anchor="rm")
    return both


def strips(clips: Tensor) -> Tensor:
    """Clips (S, F, C, H, W) -> up to five frames of each, evenly spread, side by side: (S, C, H, n W)."""
    shown = torch.linspace(0, clips.shape[1] - 1, min(_SHOWN_FRAMES, clips.shape[1])).round().long()
    return torch.cat([*clips[:, shown].unbind(1)], -1)


def to_image(image: Tensor) -> Image.Image:
    """Return an image (C, H, W) in [0, 1], gray or RGB, as PIL's; of a clip (F, C, H, W) its strip."""
    if image.ndim == 4:
        image = strips(image[None])[0]
    levels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def read_image(image: Image.Image, channels: int, resolution: int | tuple[int, int]) -> np.ndarray:
    """Return an image as uint8 (C, H, W): upright, in gray or RGB, resized and cut to its middle.

    `resolution` is the side of a square, or a width and a height.

    Raises:
        ValueError: what `plain` raises.
    """
    upright = plain(image).convert("L" if channels == 1 else "RGB")
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    if upright.size != size:
        upright = ImageOps.fit(upright, size, Image.Resampling.LANCZOS)
    pixels = np.asarray(upright)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_clip(clip: Any, size: tuple[int, int], num_frames: int) -> np.ndarray:
    """Return the first frames of a clip as uint8 (3, F, H, W), each as `read_image` reads it.

    Raises:
        ValueError: what `first_frames` and `plain` raise.
    """
    return np.stack([read_image(frame, 3, size) for frame in first_frames(clip, num_frames)], axis=1)
