"""Handwritten digits in a small causal world: thick strokes are written dark; slant and size are free.

    thickness -> darkness        slant        size

Observational images follow it; do(thickness), do(darkness), do(slant) and do(size) each replace one mechanism, so the
truth of every combination is known, whatever the order. The glyphs are scikit-learn's digits (8 x 8 pixels, 1,797 of
them), enlarged smoothly and turned into signed distances, from which scikit-image draws every image.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...contexts import ContextLike
from .linear_gaussian import LinearGaussianModel

CONCEPTS = ("thickness", "darkness", "slant", "size")
RESOLUTION = 32

# In standard units. Strengths scale the mean of an intervention: thick, light, slanted, small.
LATENTS = LinearGaussianModel(
    CONCEPTS,
    effects={("thickness", "darkness"): 0.8},
    deviations=(1.0, 0.6, 1.0, 1.0),
    interventions={"thickness": (1.5, 0.5), "darkness": (-1.5, 0.5), "slant": (1.5, 0.5), "size": (-1.5, 0.5)},
)

_GLYPH_PIXELS = 96  # side of the enlarged glyphs, of which an image shows the middle at a third of the size
_GLYPH_MARGIN = 12

Split = Literal["train", "test"]


def sample_digits(
    num: int, context: ContextLike = (), seed: int = 0, split: Split = "train"
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]:
    """Draw images from the world under a context.

    Args:
        num: number of images.
        context: the concepts intervened on; () is observational.
        seed: of the glyphs, the latents, or both: the same seed in another context keeps the glyphs and the noise, so
            row i of two contexts is a pair of counterfactuals.
        split: the glyphs of "test" are other digits than those of "train", by the same writers.

    Returns:
        Images (num, 32, 32), uint8, light ink on black; digit classes (num,); latents (num, 4) in standard units.

    Raises:
        ValueError: for a concept this world does not have.
    """
    rng = np.random.default_rng(seed)
    distances, classes = _glyphs(split)
    chosen = rng.integers(len(classes), size=num)
    latents = LATENTS.sample(num, context, rng)
    images = np.stack([_draw(distances[i], row) for i, row in zip(chosen, latents, strict=True)])
    return images, classes[chosen], latents


def read_attributes(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Measure (thickness, darkness, slant, size) in images (num, 32, 32), uint8 -> (num, 4), each in its own unit.

    Thickness: ink per length of the strokes, in pixels. Darkness: level of the ink, 0 to 1. Slant: shear of the
    ink's second moments. Size: height of the ink, in pixels. An empty image gives NaN.
    """
    return np.array([_measure(image / 255.0) for image in images])


def _measure(image: NDArray[np.float64]) -> tuple[float, float, float, float]:
    from skimage.morphology import skeletonize

    level = float(np.quantile(image, 0.98))
    if level < 0.1:
        return np.nan, np.nan, np.nan, np.nan
    ink = np.clip(image / level, 0, 1)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    mass = ink.sum()
    y, x = rows - (rows * ink).sum() / mass, columns - (columns * ink).sum() / mass
    slant = -(x * y * ink).sum() / (y * y * ink).sum()
    filled = ink > 0.5
    height = np.flatnonzero(filled.any(axis=1))
    length = max(1, int(skeletonize(filled).sum()))
    return mass / length, level, slant, float(height[-1] - height[0] + 1)


def _draw(distance: NDArray[np.float32], latents: NDArray[np.float64]) -> NDArray[np.uint8]:
    from skimage.transform import AffineTransform, warp

    thickness, darkness, slant, size = np.clip(latents, -3, 3)
    scale = 0.9 * np.exp(0.12 * size)
    zoom = _GLYPH_PIXELS / RESOLUTION / scale  # glyph pixels per image pixel
    # Output coordinates -> glyph coordinates, about the two centers; a shear to the right for positive slants.
    to_glyph = np.array([[zoom, zoom * 0.22 * slant, 0], [0, zoom, 0], [0, 0, 1]])
    center_out, center_in = (RESOLUTION - 1) / 2, (_GLYPH_PIXELS - 1) / 2
    to_glyph[:2, 2] = center_in - to_glyph[:2, :2] @ [center_out, center_out]
    far = float(distance.min())
    warped = warp(
        distance, AffineTransform(to_glyph), output_shape=(RESOLUTION, RESOLUTION), order=1, cval=far,
        preserve_range=True,
    )  # fmt: skip
    inside = warped / zoom  # signed distance to the stroke's edge in image pixels, positive in the ink
    ink = 1 / (1 + np.exp(-(inside + 0.45 * thickness - 0.3) / 0.35))
    level = 0.3 + 0.7 / (1 + np.exp(-1.2 * darkness - 0.4))
    return np.rint(255 * level * ink).astype(np.uint8)


@cache
def _glyphs(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Signed distances (num, 96, 96) to the edge of every glyph's ink, and their classes."""
    from scipy.ndimage import distance_transform_edt
    from skimage.transform import resize
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    test = np.arange(len(digits.target)) % 4 == 3
    keep = test if split == "test" else ~test
    side = _GLYPH_PIXELS - 2 * _GLYPH_MARGIN
    distances = []
    for image in digits.images[keep] / 16.0:
        enlarged: Any = resize(image, (side, side), order=3)
        ink = np.pad(enlarged, _GLYPH_MARGIN) > 0.5
        inside, outside = (np.asarray(distance_transform_edt(part)) for part in (ink, ~ink))
        distances.append(inside - outside)
    return np.stack(distances).astype(np.float32), digits.target[keep].astype(np.int64)
