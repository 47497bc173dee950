"""Letters drawn from a folder of fonts: images with which to pretrain a base that has never seen a digit.

Like the digit world's images they are light strokes on black, 32 x 32. All else differs: the shapes, their place and
size, sharp edges, serifs, and an ink level that has nothing to do with the weight of the strokes.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RESOLUTION = 32
LETTERS = "ACEFHJKLMNPRTUVWXYacdefhkmnprtuvwxy"  # without those that look like a digit: O like 0, l like 1, S like 5
_SIZES = range(18, 37, 3)  # of the font, in pixels
_LARGEST = 28  # of a letter, in pixels: wider ones are drawn with the smallest font
_SHIFT = 4  # pixels from the center, at most, and none that would cut a letter
_LEVELS = (90, 255)  # of the ink
_AT_ONCE = 200  # images that share a random generator


def sample_letters(num: int, fonts_dir: Path, seed: int = 0) -> NDArray[np.uint8]:
    """Draw images (num, 32, 32) of random letters; the first ones do not depend on how many are drawn.

    Args:
        num: number of images.
        fonts_dir: folder of .ttf files; every variable font is drawn at random places on all of its axes.
        seed: of letters, fonts, axes, sizes, places and ink levels.

    Raises:
        FileNotFoundError: for a folder without fonts.
    """
    if not list(fonts_dir.glob("*.ttf")):
        raise FileNotFoundError(f"There are no .ttf files in {fonts_dir}. Give a folder of fonts by --fonts_dir.")
    parts = range(-(-num // _AT_ONCE))
    with ProcessPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        drawn = list(pool.map(partial(_draw_part, fonts_dir, seed), parts))
    return np.concatenate(drawn)[:num]


def _draw_part(fonts_dir: Path, seed: int, part: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng([seed, part])
    return np.stack([_draw(_fonts(fonts_dir), rng) for _ in range(_AT_ONCE)])


def _draw(fonts: list[dict[int, ImageFont.FreeTypeFont]], rng: np.random.Generator) -> NDArray[np.uint8]:
    sizes = fonts[rng.integers(len(fonts))]
    letter = LETTERS[rng.integers(len(LETTERS))]
    axes = _axes(sizes[_SIZES[0]])
    places = [float(rng.uniform(low, high)) for low, high in axes]
    chosen = _SIZES[rng.integers(len(_SIZES))]
    shift = rng.uniform(-1, 1, size=2)
    level = int(rng.integers(_LEVELS[0], _LEVELS[1] + 1))
    for size in (chosen, _SIZES[0]):
        font = sizes[size]
        if places:
            font.set_variation_by_axes(places)
        left, top, right, bottom = font.getbbox(letter)
        if max(right - left, bottom - top) <= _LARGEST:
            break
    room = (RESOLUTION - np.array([right - left, bottom - top])) // 2
    x, y = room - (left, top) + np.rint(shift * np.clip(room - 1, 0, _SHIFT))
    image = Image.new("L", (RESOLUTION, RESOLUTION))
    ImageDraw.Draw(image).text((x, y), letter, fill=level, font=font)
    return np.asarray(image)


@cache
def _fonts(fonts_dir: Path) -> list[dict[int, ImageFont.FreeTypeFont]]:
    """Every font at every size."""
    return [{size: ImageFont.truetype(str(path), size) for size in _SIZES} for path in sorted(fonts_dir.glob("*.ttf"))]


def _axes(font: ImageFont.FreeTypeFont) -> list[tuple[float, float]]:
    """Bounds of every axis; none for a font that has no axes."""
    try:
        return [(float(axis["minimum"] or 0), float(axis["maximum"] or 0)) for axis in font.get_variation_axes()]
    except OSError:
        return []
