"""Letters and digits of a variable font in a small causal world: bold type is set wider; slant and contrast are free.

    weight -> width        slant        contrast

Every concept is an axis of the font, so the truth of every combination is known, at every strength. Images follow the
law above, or none (`dependent=False`); do(weight), do(width), do(slant) and do(contrast) each replace one mechanism.

The font is Science Gothic (SIL Open Font License), which has all four axes; `--fonts_dir` names the folder of
ScienceGothic.ttf. `examples/letters.py` draws what a base sees that never saw this font.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hf_causal_context.contexts import ContextLike
from hf_causal_context.data.worlds.linear_gaussian import LinearGaussianModel
from hf_causal_context.errors import UserValueError

CONCEPTS = ("weight", "width", "slant", "contrast")
RESOLUTION = 32
CHARACTERS = "ABCDEFGHJKLNOPQRSTUVXZabcdefghknopqrstuxyz2345689"  # without the narrowest and the widest

_EFFECTS = {("weight", "width"): 0.8}
# In standard units. Strengths scale the mean of an intervention: bold, narrow, slanted, of high contrast.
_INTERVENTIONS = {"weight": (1.5, 0.5), "width": (-1.5, 0.5), "slant": (1.5, 0.5), "contrast": (1.5, 0.5)}
# Axis of the font -> its value at 0, and what one standard unit adds.
_AXES = {"weight": (400.0, 130.0), "width": (105.0, 18.0), "slant": (-2.0, -2.4), "contrast": (12.0, 26.0)}
_FONT = "ScienceGothic.ttf"
_SIZE = RESOLUTION * 5 / 6  # of the font, in pixels


def latent_model(dependent: bool = True) -> LinearGaussianModel:
    """Return the structural causal model of the axes, in standard units; without its edge if not `dependent`."""
    effects = _EFFECTS if dependent else {}
    return LinearGaussianModel(CONCEPTS, effects, (1.0, 0.6, 1.0, 1.0), _INTERVENTIONS)


def sample_type(
    num: int,
    context: ContextLike = (),
    seed: int = 0,
    *,
    fonts_dir: Path,
    dependent: bool = True,
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw images from the world under a context, light type on black.

    Args:
        num: number of images.
        context: the concepts intervened on, at any strength; () is observational.
        seed: of the characters and the axes: the same seed in another context keeps both, so row i of two contexts is
            a pair of counterfactuals.
        fonts_dir: folder of ScienceGothic.ttf.
        dependent: False removes the edge between weight and width.

    Returns:
        Images (num, 32, 32), uint8; latents (num, 4) in standard units, in the order of `CONCEPTS`.

    Raises:
        ValueError: for a concept this world does not have, or a font without its four axes.
        FileNotFoundError: for a folder without the font.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(CHARACTERS), size=num)
    latents = latent_model(dependent).sample(num, context, rng)
    images = [_draw(CHARACTERS[i], row, fonts_dir) for i, row in zip(chosen, latents, strict=True)]
    return np.stack(images) if images else np.empty((0, RESOLUTION, RESOLUTION), np.uint8), latents


def _draw(character: str, latents: NDArray[np.float64], fonts_dir: Path) -> NDArray[np.uint8]:
    font, bounds = _font(fonts_dir)
    wanted = {name: _AXES[name][0] + _AXES[name][1] * value for name, value in zip(CONCEPTS, latents, strict=True)}
    font.set_variation_by_axes([float(np.clip(wanted[name], low, high)) for name, (low, high) in bounds.items()])
    left, _, right, _ = font.getbbox(character, anchor="ls")
    image = Image.new("L", (RESOLUTION, RESOLUTION))
    # Centered across; on one baseline, with room for descenders below.
    place = ((RESOLUTION - left - right) / 2, RESOLUTION * 0.76)
    ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="ls")
    return np.asarray(image)


@cache
def _font(fonts_dir: Path) -> tuple[ImageFont.FreeTypeFont, dict[str, tuple[float, float]]]:
    """The font, and the bounds of its axes by concept, in the font's order."""
    path = fonts_dir / _FONT
    if not path.exists():
        raise FileNotFoundError(f"There is no {_FONT} in {fonts_dir}. Download the font, and give its folder.")
    font = ImageFont.truetype(str(path), _SIZE)
    try:
        axes = font.get_variation_axes()
    except OSError:
        axes = []
    names = [bytes(axis["name"] or b"").decode().lower() for axis in axes]
    if sorted(names) != sorted(CONCEPTS):
        raise UserValueError(
            f"{path} has the axes {names}; this world needs {list(CONCEPTS)}. Take the variable font Science Gothic."
        )
    return font, {
        name: (float(axis["minimum"] or 0), float(axis["maximum"] or 0)) for name, axis in zip(names, axes, strict=True)
    }
