"""Masks of images: what is white in one counts in the loss, what is black does not."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from .._files import in_one_spelling
from ..errors import UserValueError
from ..media.pixels import is_transparent, plain
from .captions import by_stem

SUFFIX = ".mask.png"


def is_mask(file: Path) -> bool:
    """Return whether a file is the mask of an image, by its name."""
    return file.name.lower().endswith(SUFFIX)


def masks_of(images: Iterable[Path], masks: Iterable[Path]) -> dict[Path, Path]:
    """Return the masks of the images that have one: ``a.mask.png`` is that of ``a.png``, ``a.jpg`` and so on.

    Raises:
        ValueError: for a mask without an image.
    """
    named, found = by_stem(images), {}
    for mask in masks:
        stem = mask.with_name(mask.name[: -len(SUFFIX)])
        if (key := in_one_spelling(stem)) not in named:
            raise UserValueError(
                f"{str(mask)!r} has the name of a mask, but there is no image {stem.name!r} beside it, such as "
                f"{stem.name + '.png'!r}. Add it, or rename the file if it is an image itself."
            )
        found |= dict.fromkeys(named[key], mask)
    return found


def plain_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Return a mask upright and in gray.

    Raises:
        ValueError: for one that is black everywhere, is transparent in places, or has another size than its image.
    """
    if is_transparent(mask):
        raise UserValueError("its mask is transparent in places. Save it in black and white.")
    gray, size = plain(mask).convert("L"), plain(image).size
    if gray.size != size:
        raise UserValueError(f"its mask is {gray.size[0]} x {gray.size[1]} pixels, the image {size[0]} x {size[1]}.")
    if gray.getextrema() == (0, 0):
        raise UserValueError("its mask is black everywhere, so that nothing would be learned. Remove the image.")
    return gray


def check_mask(content: bytes, image: Image.Image) -> None:
    """Refuse a mask, as it is stored, that cannot be read or does not fit its image (ValueError)."""
    try:
        mask = Image.open(io.BytesIO(content))
        mask.load()
    except Exception as error:  # decoders raise whatever they like
        raise UserValueError(f"its mask cannot be read: {type(error).__name__}") from error
    plain_mask(mask, image)
