"""Digits whose strokes have a thickness that causes their intensity: the public benchmark's world, rebuilt.

    t = 0.5 + Gamma(shape 10, rate 5)                thickness, pixels
    i = 64 + 191 sigmoid(0.5 e + 2 t - 5)            intensity, gray levels; e ~ N(0, 1)
    x = set_intensity(set_thickness(digit, t), i)    digit: of MNIST

Thickness is the mean width of the strokes: twice the distance from their middle line to the nearest paper. Intensity is
the median level of the ink, the pixels above half of the maximum. Interventions set one of the two, or both. Whoever
sets the thickness alone moves the intensity too, by the same e.

The published test images come with t and i, and are the test digits of MNIST in order, so that every counterfactual is
known: the same digit and the same e. The published training images are not used: they are rebuilt by this recipe,
which was written from its description. Strokes grow and shrink by the distance to their edge, in quarters of a pixel,
and the amount is corrected until the thickness measured in the result is the one asked for.

Sources: Castro et al., "Morpho-MNIST" (JMLR 2019); Pawlowski et al., "Deep Structural Causal Models" (NeurIPS 2020),
for the recipe; Melistas et al., "Benchmarking Counterfactual Image Generation" (NeurIPS 2024), for the benchmark.

Shapes: N digits of 28 x 28 pixels, uint8, light ink on black.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_causal_context.contexts import ConceptSet, Context
from hf_causal_context.errors import UserValueError

from .morphology import SIDE, load_mnist

CONCEPTS = ("thick", "thin", "bright", "dark")
THICKNESS = {"thick": 4.0, "thin": 1.5}  # what the concepts set it to
INTENSITY = {"bright": 235.0, "dark": 90.0}
SINGLES = tuple(Context(name) for name in CONCEPTS)
PAIRS = tuple(Context(t, i) for t in THICKNESS for i in INTENSITY)
SHAPE_ATTRIBUTES = ("slant", "width", "height")  # what no intervention of this world changes
ATTRIBUTES = ("thickness", "intensity", *SHAPE_ATTRIBUTES)

_ENLARGEMENT = 4
_TOLERANCE = 0.02  # of the thickness, pixels
_MAX_CORRECTIONS = 6

Images = NDArray[np.uint8]
Values = NDArray[np.floating[Any]]


def intensity(thickness: Values, noise: Values) -> Values:
    """Return what thickness causes."""
    return 64 + 191 / (1 + np.exp(-(0.5 * noise + 2 * thickness - 5)))


def noise(thickness: Values, intensity: Values) -> Values:
    """Return the e by which this thickness caused this intensity."""
    share = np.clip((intensity - 64) / 191, 1e-4, 1 - 1e-4)
    return 2 * (np.log(share / (1 - share)) - 2 * thickness + 5)


def sample_noise(num: int, rng: np.random.Generator) -> tuple[Values, Values]:
    """Draw thickness without intervention, and e, of so many digits."""
    return 0.5 + rng.gamma(10, 1 / 5, num), rng.standard_normal(num)


def under(context: Context, thickness: Values, noise: Values) -> tuple[Values, Values]:
    """Return thickness and intensity of the same digits in a context.

    Raises:
        ValueError: for a concept this world does not have, a strength other than 1, or two that set the same.
    """
    made = ConceptSet(CONCEPTS).mask([context])[0]
    both = [set(names) <= set(context.targets) for names in (THICKNESS, INTENSITY)]
    if not set(made.tolist()) <= {0.0, 1.0} or any(both):
        raise UserValueError(
            f"{context!r} is no context of this world. It has thick or thin, and bright or dark, at strength 1."
        )
    for name in THICKNESS.keys() & set(context.targets):
        thickness = np.full_like(thickness, THICKNESS[name])
    level = intensity(thickness, noise)
    for name in INTENSITY.keys() & set(context.targets):
        level = np.full_like(level, INTENSITY[name])
    return thickness, level


def draw(digits: Images, thickness: Values, intensity: Values) -> Images:
    """Return the digits with this thickness and intensity (N,) of their strokes."""
    rows = zip(digits, thickness, intensity, strict=True)
    return np.stack([_with_intensity(_with_thickness(digit, float(t)), float(i)) for digit, t, i in rows])


def measure(images: Images) -> Values:
    """Read the ATTRIBUTES (N, 5); NaN where there is no ink. Shape is that of the strokes' middle lines."""
    return np.array([_measured(image) for image in images])


def load_test(public: Path, mnist: Path) -> tuple[Images, Images, NDArray[np.int64], Values, Values]:
    """Return the published test images, MNIST's digits that they were made of, classes, thickness and intensity."""
    images, classes = load_mnist(public, "test")
    digits, same = load_mnist(mnist, "test")
    if not np.array_equal(classes, same):
        raise SystemExit(
            f"The digits of {public} and {mnist} are not the same, in the same order. Download both again."
        )
    with (public / "t10k-morpho.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = [np.array([float(row[name]) for row in rows]) for name in ("thickness", "intensity")]
    return images, digits, classes, columns[0], columns[1]


def _measured(image: Images) -> list[float]:
    from skimage.morphology import skeletonize

    if image.max() < 16:
        return [np.nan] * len(ATTRIBUTES)
    line, distance = _strokes(_enlarged(image) > image.max() / 2, skeletonize)
    points = np.argwhere(line) / _ENLARGEMENT
    if len(points) < 2:
        return [np.nan] * len(ATTRIBUTES)
    spread = np.cov(points.T)
    slant = spread[0, 1] / max(spread[0, 0], 1e-3)
    level = float(np.median(image[image >= image.max() / 2]))
    return [_width(line, distance), level, -slant, float(spread[1, 1] ** 0.5), float(spread[0, 0] ** 0.5)]


def _with_thickness(digit: Images, thickness: float) -> Values:
    """Return levels in [0, 1]."""
    from scipy.ndimage import distance_transform_edt
    from skimage.morphology import skeletonize

    ink = _enlarged(digit) > 127
    line, inside = _strokes(ink, skeletonize)
    outwards: Any = distance_transform_edt(~ink)
    edge = outwards - inside  # of the strokes: below 0 in the ink
    of_line: Any = distance_transform_edt(~line)
    grown, result = thickness - _width(line, inside), np.zeros((SIDE, SIDE))
    for _ in range(_MAX_CORRECTIONS):
        # Strokes that would vanish stay as lines of about a pixel.
        nearest = np.minimum(edge - _ENLARGEMENT * grown / 2, of_line - _ENLARGEMENT / 2)
        result = _reduced(np.clip(0.5 - nearest, 0, 1))
        big = _enlarged(result)
        wrong = thickness - _width(*_strokes(big > result.max() / 2, skeletonize))
        if abs(wrong) < _TOLERANCE:
            break
        grown += 0.8 * wrong
    return result


def _with_intensity(levels: Values, intensity: float) -> Images:
    median = np.median(levels[levels >= levels.max() / 2])
    return np.rint(np.clip(levels * intensity / median, 0, 255)).astype(np.uint8)


def _strokes(ink: NDArray[np.bool_], skeletonize: Any) -> tuple[NDArray[np.bool_], Values]:
    """Return their middle line, and the distance of their pixels to the paper."""
    from scipy.ndimage import distance_transform_edt

    distance: Any = distance_transform_edt(ink)
    return skeletonize(ink), distance


def _width(line: NDArray[np.bool_], distance: Values) -> float:
    return 2 * float(distance[line].mean()) / _ENLARGEMENT


def _enlarged(digit: NDArray[Any]) -> Values:
    from scipy.ndimage import zoom

    return np.asarray(zoom(digit.astype(np.float64), _ENLARGEMENT, order=1, mode="nearest", grid_mode=True))


def _reduced(large: Values) -> Values:
    return large.reshape(SIDE, _ENLARGEMENT, SIDE, _ENLARGEMENT).mean(axis=(1, 3))
