"""The quad world of the paper: four colored quarters behind a shape, and the causal model that their latents follow.

Eight latent variables of a linear Gaussian structural causal model are standardized by their observational moments and
mapped by the standard normal distribution function to u in [0, 1]; the images are a function of these u.

    quad1 .. quad4   hues of the quarters: lower left, lower right, upper left, upper right
    size             of the centered shape: its diameter is 48 (0.2 + 0.8 u) pixels of 64
    color            hue of the shape
    shape            round(3 u): circle, square, triangle, ellipse
    orientation      turns the shape counter-clockwise by 2 pi u

Hues lie on the piecewise linear path red, yellow, green, cyan, blue, magenta. The diameter of a square is its side. A
triangle is equilateral, inscribed in the circle of its diameter, and points up before it is turned; the long axis
of an ellipse is its diameter and horizontal, the short one half as long. Edges are antialiased, so that the image
determines its latents.

Source: Markham et al., "Intervening to Learn and Compose Causally Disentangled Representations" (CLeaR 2026).

Shapes: N samples, S pixels per side, T templates, P pixels of a reduced image.
"""

from __future__ import annotations

import operator
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_causal_context.contexts import Context, ContextLike
from hf_causal_context.data.worlds.linear_gaussian import LinearGaussianModel
from hf_causal_context.errors import UserValueError

# Intervened on; color and shape never are.
CONCEPTS = ("quad1", "quad2", "quad3", "quad4", "size", "orientation")
HELD_OUT = (
    *(Context("quad1", other) for other in CONCEPTS[1:]),
    *(Context("quad2", other) for other in CONCEPTS[2:]),
)
VARIABLES = ("quad1", "quad2", "quad3", "quad4", "size", "color", "shape", "orientation")

_EFFECTS = {
    ("quad2", "quad1"): -1.23,
    ("quad3", "quad2"): 1.56,
    ("quad4", "quad1"): 1.34,
    ("quad4", "quad3"): -0.72,
    ("color", "quad1"): -0.95,
    ("color", "size"): 1.67,
    ("shape", "quad2"): 0.58,
    ("shape", "color"): -1.34,
    ("orientation", "quad1"): 1.12,
    ("orientation", "size"): -0.81,
    ("orientation", "shape"): 1.45,
}
_NOISE_VARIANCES = (1.3855493, 1.16426732, 1.00502177, 1.95646855, 1.27482347, 1.42, 1.31, 1.18)
_INTERVENTION_MEANS = (1.16920556, 1.47496736, -1.60596209, -1.96578519, 1.0117071, -0.85, 1.23, -0.67)
_INTERVENTION_VARIANCES = (1.94878138, 1.35886756, 1.57343313, 1.1021785, 1.30511067, 1.52, 1.41, 1.26)

_SIZE, _COLOR, _SHAPE, _ORIENTATION = (VARIABLES.index(name) for name in ("size", "color", "shape", "orientation"))
_HUES = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]], dtype=np.float32)

_Floats: TypeAlias = NDArray[np.floating]

_SMALLEST_SIDE = 8  # an eighth of the side is what no shape covers in the corners
_CHUNK_PIXELS = 2**18  # per step: a few arrays of this size stay in the processor's cache

# The templates that shapes are compared with: every size, and every angle up to the symmetry of the shape.
_TEMPLATE_SIZES = np.linspace(0.2, 1, 21)
_TEMPLATE_TURNS = ((1, 1.0), (8, 1 / 4), (12, 1 / 3), (16, 1 / 2))  # shape -> number of angles, part of a full turn
# How far each template is turned, as a share of that part; a circle is not.
_TEMPLATE_PHASES = np.array([np.nan if n == 1 else turn / n for n, _ in _TEMPLATE_TURNS for turn in range(n)])
_TEMPLATE_SIDE = 32  # images are reduced to about this side for the comparison
_INVISIBLE = 0.02  # a shape whose color is this near to all quarters' has no size to read


def latent_model(dependent: bool = True) -> LinearGaussianModel:
    """The structural causal model of the latents, before they are standardized; without edges if not `dependent`."""
    columns = zip(VARIABLES, _INTERVENTION_MEANS, _INTERVENTION_VARIANCES, strict=True)
    interventions = {name: (mean, variance**0.5) for name, mean, variance in columns if name in CONCEPTS}
    deviations = [variance**0.5 for variance in _NOISE_VARIANCES]
    return LinearGaussianModel(VARIABLES, _EFFECTS if dependent else {}, deviations, interventions)


def standardized_latents(
    num: int, context: ContextLike = (), seed: int = 0, *, dependent: bool = True
) -> NDArray[np.float64]:
    """Draw latents (num, 8) in units of their observational standard deviation, in the order of `VARIABLES`.

    Raises:
        ValueError: for a concept this world does not have.
    """
    model = latent_model(dependent)
    return model.sample(num, context, np.random.default_rng(seed)) / model.deviations()


def sample_quad(
    num: int, context: ContextLike = (), seed: int = 0, *, size: int = 64, dependent: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw images (num, 3, size, size), uint8 RGB, and their u (num, 8) in [0, 1], in the order of `VARIABLES`.

    Args:
        num: number of samples.
        context: the concepts intervened on; () is observational.
        seed: the same seed in another context keeps the noise: row i of both is a pair of counterfactuals.
        size: side of the images in pixels; everything in them scales with it. The published images have 64.
        dependent: False removes all edges between the latents. (The paper's independent data have a generator of their
            own, so that distances in this world are not comparable with its numbers.)

    Raises:
        ValueError: for a concept this world does not have, or images of fewer than 8 pixels a side.
    """
    size = _checked_side(size)
    latents = standardized_latents(num, context, seed, dependent=dependent)
    values = torch.special.ndtr(torch.from_numpy(latents)).numpy()
    images = np.empty((num, 3, size, size), np.uint8)
    for rows in _chunks(num, size):
        _draw(values[rows].astype(np.float32), images[rows])
    return images, values


def read_quad(images: NDArray[np.uint8] | _Floats | Tensor) -> dict[str, NDArray[np.float64]]:
    """Measure what images (N, 3, S, S) show: "quad1", "quad2", "quad3", "quad4", "size" and "orientation", each (N,).

    All are the u, apart from the orientation: shapes look the same after a part of a full turn (a square after 1/4, a
    triangle 1/3, an ellipse 1/2), and it is the share of that part, in [0, 1), by which the shape is turned; NaN for
    circles.

    Images are uint8, or floating point in [0, 1], arrays or tensors. Hues are those of the four corners, which no
    shape covers. Size and orientation are those of the shape which fits best in least squares, among templates of all
    four kinds; they are NaN where the shape has the color of every quarter. Below 16 pixels a side they are rough
    estimates: no pixel needs to lie within the shape.

    Raises:
        ValueError: for images of another shape, or fewer than 8 pixels a side.
    """
    array = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images)
    if array.ndim != 4 or array.shape[1] != 3 or array.shape[2] != array.shape[3]:
        raise UserValueError(
            f"read_quad takes square RGB images (N, 3, side, side); received the shape {array.shape}. Move the "
            "channels to the second axis, and crop to squares."
        )
    if not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise UserValueError(
            f"read_quad takes images of dtype uint8, or floating point in [0, 1]; received {array.dtype}. Convert "
            "them with .astype(np.uint8)."
        )
    side = _checked_side(array.shape[2])
    scale = np.float32(255 if array.dtype == np.uint8 else 1)
    hues = np.empty((len(array), 4))
    sizes, turns = np.empty(len(array)), np.empty(len(array))
    for rows in _chunks(len(array), side):
        chunk = array[rows].astype(np.float32) / scale
        corners = _corner_colors(chunk)
        hues[rows] = _hue_to_u(corners)
        sizes[rows], turns[rows] = _read_shapes(chunk, corners)
    hue_columns = {name: hues[:, i] for i, name in enumerate(VARIABLES[:4])}
    return {**hue_columns, "size": (sizes - 0.2) / 0.8, "orientation": turns}


def _checked_side(size: int) -> int:
    side = operator.index(size)
    if side < _SMALLEST_SIDE:
        raise UserValueError(
            f"Images of {side} pixels a side are too small: below {_SMALLEST_SIDE} the shape can cover the corners. "
            f"Give {_SMALLEST_SIDE} or more."
        )
    return side


def _chunks(num: int, side: int) -> list[slice]:
    rows = max(1, _CHUNK_PIXELS // side**2)
    return [slice(start, min(start + rows, num)) for start in range(0, num, rows)]


def _quarters(side: int) -> tuple[tuple[slice, slice], ...]:
    """Rows and columns of quad1 .. quad4."""
    first, second = slice(0, side // 2), slice(side // 2, side)
    return (second, first), (second, second), (first, first), (first, second)


def _u_to_hue(u: _Floats) -> NDArray[np.float32]:
    """u (...) -> RGB (..., 3) in [0, 1]."""
    knots = np.linspace(0, 1, len(_HUES))
    return np.stack([np.interp(u, knots, channel) for channel in _HUES.T], axis=-1).astype(np.float32)


def _hue_to_u(colors: NDArray[np.float32]) -> _Floats:
    """RGB (..., 3) in [0, 1] -> u (...) of the nearest color on the path."""
    starts, steps = _HUES[:-1], np.diff(_HUES, axis=0)  # of length 1, every one
    along = np.clip(((colors[..., None, :] - starts) * steps).sum(axis=-1), 0, 1)
    nearest = starts + along[..., None] * steps
    segment = np.square(colors[..., None, :] - nearest).sum(axis=-1).argmin(axis=-1)
    return (segment + np.take_along_axis(along, segment[..., None], axis=-1)[..., 0]) / len(starts)


def _draw(values: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Values (n, 8) in [0, 1] -> images (n, 3, S, S), written to `out`."""
    side = out.shape[-1]
    covered = _coverage(
        np.rint(3 * values[:, _SHAPE]).astype(int), 0.2 + 0.8 * values[:, _SIZE], values[:, _ORIENTATION], side
    )[:, None]
    colors = 255 * _u_to_hue(values[:, [0, 1, 2, 3, _COLOR]])[..., None, None]
    shape_color = colors[:, 4]
    for quarter, (rows, columns) in enumerate(_quarters(side)):
        background = colors[:, quarter]
        part = covered[..., rows, columns] * (shape_color - background)
        part += background + np.float32(0.5)  # the assignment rounds down
        out[..., rows, columns] = part


def _coverage(shapes: NDArray[np.int_], sizes: _Floats, turns: _Floats, side: int) -> NDArray[np.float32]:
    """How much of every pixel a shape covers, (n, S, S) in [0, 1]; shapes, sizes and turns are (n,)."""
    grid = np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)
    x, y = grid[None, None, :], -grid[None, :, None]  # y points up
    diameters = np.float32(48 / 64 * side) * sizes.astype(np.float32)[:, None, None]
    angles = (2 * np.pi * turns)[:, None, None]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    covered = np.empty((len(shapes), side, side), np.float32)
    for shape, distance in enumerate((_to_circle, _to_square, _to_triangle, _to_ellipse)):
        rows = np.flatnonzero(shapes == shape)
        along, across = x * cos[rows] + y * sin[rows], y * cos[rows] - x * sin[rows]
        # A straight edge at distance d from the middle of a pixel leaves about 1/2 - d of it covered.
        covered[rows] = np.clip(np.float32(0.5) - distance(along, across, diameters[rows]), 0, 1)
    return covered


# Signed distances in pixels, negative inside, from points (n, S, S) in the axes of the shape to its edge; diameters
# (n, 1, 1). Beyond corners they are those to the prolonged sides, which lets the corners be sharp.


def _to_circle(x: _Floats, y: _Floats, diameter: _Floats) -> _Floats:
    return np.sqrt(x * x + y * y) - diameter / 2


def _to_square(x: _Floats, y: _Floats, diameter: _Floats) -> _Floats:
    return np.maximum(np.abs(x), np.abs(y)) - diameter / 2


def _to_triangle(x: _Floats, y: _Floats, diameter: _Floats) -> _Floats:
    # The inscribed circle has half the radius of the circumscribed one.
    return np.maximum(-y, 0.75**0.5 * np.abs(x) + y / 2) - diameter / 4


def _to_ellipse(x: _Floats, y: _Floats, diameter: _Floats) -> _Floats:
    # To first order: the level set function over the length of its gradient; away from 0 / 0 in the center.
    level = np.maximum(np.sqrt(x * x + 4 * y * y), 1e-6)
    return level * (level - diameter / 2) / np.maximum(np.sqrt(x * x + 16 * y * y), 1e-6)


def _corner_colors(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images (n, 3, S, S) -> mean colors (n, 4, 3) of the corners of quad1 .. quad4 which no shape reaches."""
    margin = images.shape[-1] // 8
    first, last = slice(0, margin), slice(-margin, None)
    corners = ((last, first), (last, last), (first, first), (first, last))
    return np.stack([images[..., rows, columns].mean(axis=(2, 3)) for rows, columns in corners], axis=1)


def _read_shapes(
    images: NDArray[np.float32], corners: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sizes (n,), in [0.2, 1], and turns (n,), in [0, 1), of the shapes in images (n, 3, S, S) with corners (n, 4, 3).

    With t the coverage of a template and c - q the difference of the shape's color and a quarter's, an image is
    q + t (c - q), so the squared error of a template is |c - q|^2 t^2 - 2 t <image - q, c - q> + constant, summed
    over the pixels. A quarter of nearly the shape's color so has nearly no weight. A parabola through the errors of
    three neighboring sizes gives one between those of the templates.
    """
    side = images.shape[-1]
    middle = slice((side - 1) // 2, side // 2 + 1)
    contrasts = images[..., middle, middle].mean(axis=(2, 3))[:, None] - corners
    weights = np.square(contrasts).sum(axis=-1)  # (n, 4)
    visible = np.empty((len(images), side, side), np.float32)
    for quarter, (rows, columns) in enumerate(_quarters(side)):
        difference = images[..., rows, columns] - corners[:, quarter, :, None, None]
        visible[:, rows, columns] = np.einsum("nchw,nc->nhw", difference, contrasts[:, quarter])

    templates, squares = _templates(side)
    errors = weights @ squares.T - 2 * _reduced(visible, _reduction(side)) @ templates.T
    errors = errors.reshape(len(errors), -1, len(_TEMPLATE_SIZES))
    each = np.arange(len(errors))
    kind, place = np.divmod(errors.reshape(len(errors), -1).argmin(axis=1), len(_TEMPLATE_SIZES))
    place = np.clip(place, 1, len(_TEMPLATE_SIZES) - 2)
    before, here, after = (errors[each, kind, place + offset].astype(np.float64) for offset in (-1, 0, 1))
    curvature = before - 2 * here + after
    offset = np.divide((before - after) / 2, curvature, out=np.zeros(len(each)), where=curvature > 0)
    sizes = _TEMPLATE_SIZES[place] + np.clip(offset, -1, 1) * (_TEMPLATE_SIZES[1] - _TEMPLATE_SIZES[0])
    visible_at_all = weights.max(axis=1) > _INVISIBLE**2
    return np.where(visible_at_all, sizes, np.nan), np.where(visible_at_all, _TEMPLATE_PHASES[kind], np.nan)


def _reduction(side: int) -> int:
    """By how much images are reduced for the comparison with templates, the quarters kept apart."""
    return max((f for f in range(1, side // _TEMPLATE_SIDE + 1) if side % (2 * f) == 0), default=1)


def _reduced(images: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Images (n, S, S) -> means of squares of `factor` pixels, flattened (n, P)."""
    side = images.shape[-1] // factor
    blocks = images.reshape(len(images), side, factor, side, factor)
    return blocks.mean(axis=(2, 4)).reshape(len(images), side * side)


@cache
def _templates(side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coverages (T, P), the sizes of one shape and angle in a row, and the sums of their squares by quarter, (T, 4)."""
    kinds = [
        (shape, size, turn)
        for shape, (number, period) in enumerate(_TEMPLATE_TURNS)
        for turn in np.arange(number) * (period / number)
        for size in _TEMPLATE_SIZES
    ]
    shapes, sizes, turns = (np.array(column) for column in zip(*kinds, strict=True))
    factor = _reduction(side)
    parts = [
        _reduced(_coverage(shapes[rows], sizes[rows], turns[rows], side), factor) for rows in _chunks(len(kinds), side)
    ]
    covered = np.concatenate(parts)
    images = covered.reshape(-1, side // factor, side // factor)
    quarters = [images[:, rows, columns] for rows, columns in _quarters(side // factor)]
    return covered, np.stack([np.square(part).sum(axis=(1, 2)) for part in quarters], axis=1)
