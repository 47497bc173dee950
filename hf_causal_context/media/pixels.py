"""Images of any kind of file as models see them: upright, with 8 bits per channel and nothing transparent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserValueError

BACKGROUND = "white"
LONGEST = 4  # times the width; the bounds of aspect-ratio buckets
_ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height are exchanged
_NO_RANGE = "and nothing says which of them is black and which is white. Save it with 8 or 16 bits per channel."
_UNREAD = {
    "F": f"holds floating point numbers, {_NO_RANGE}",  # Pillow would cut them off at 255
    "I": f"holds 32-bit integers, {_NO_RANGE}",
    "LAB": "is in the color space Lab, which Pillow does not make gray or RGB. Save it in RGB.",
}


def plain(image: Image.Image) -> Image.Image:
    """Return an image upright, with 8 bits per channel and nothing transparent.

    16 bits are scaled, and what is transparent shows the background.

    Raises:
        ValueError: for numbers of which nobody knows which one is white, or colors that Pillow does not convert.
    """
    _check_readable(image)
    image = ImageOps.exif_transpose(image)
    if _has_16_bits(image):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    background = Image.new("RGBA", image.size, BACKGROUND)
    background.alpha_composite(image.convert("RGBA"))
    return background


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height of an image as one sees it; it is not decoded."""
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def is_transparent(image: Image.Image) -> bool:
    """Return whether an image is transparent anywhere, not only able to be."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


def remarks(image: Image.Image) -> Iterator[str]:
    """Say in which ways more is in an image than a model sees, to follow "n images".

    Raises:
        ValueError: as `plain`.
    """
    _check_readable(image)
    if _has_16_bits(image):
        yield "have 16 bits per channel. They are scaled to 8."
    elif is_transparent(image):
        yield f"are transparent in places. These are {BACKGROUND}; put the images on another background if it is wrong."
    if max(image.size) > LONGEST * min(image.size):
        yield f"are over {LONGEST} times as long as wide. Only their middle is used; cut them to what is to be learned."
    if getattr(image, "is_animated", False):
        yield "have several frames. Only the first is used."


def _check_readable(image: Image.Image) -> None:
    if image.mode in _UNREAD:
        name = getattr(image, "filename", "")
        raise UserValueError(f"The image{f' {name!r}' if name else ''} {_UNREAD[image.mode]}")


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16")
