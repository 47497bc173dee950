"""Handwritten digits under morphological operations: the MNIST contexts of the paper.

Every concept is one deterministic operation on a digit of 28 x 28 pixels, light ink on black:

    scaled       shrunk about the center of the image
    shear        slanted to the right
    shift        moved to the lower right
    swelling     magnified around one point of the ink
    thickening   the ink grows on all sides (dilation)
    thinning     the ink shrinks on all sides, down to its skeleton (erosion)

The published images are a download of which the strengths are not known; those here were chosen by eye, so distances
in this world cannot be compared with the paper's in absolute value. Joint contexts apply one operation after the other,
the strokes first, then the geometry, whatever the order of the names.

Sources: Markham et al., "Intervening to Learn and Compose Causally Disentangled Representations" (CLeaR 2026); Castro
et al., "Morpho-MNIST" (JMLR 2019), for such operations on digits.

Shapes: N digits.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hf_causal_context.contexts import ContextLike, as_context
from hf_causal_context.errors import UserValueError
from hf_causal_context.messages.progress import ProgressBar
from hf_causal_context.messages.wording import quoted

CONCEPTS = ("scaled", "shear", "shift", "swelling", "thickening", "thinning")
SIDE = 28

SCALE = 0.65  # of the digit's own size
SHEAR = 0.5  # columns to the right per row up
SHIFT = (3, 3)  # rows down, columns to the right
SWELLING_RADIUS = 10.0  # pixels around the center of the swelling that it moves
SWELLING_STRENGTH = 0.7  # by how much the center is magnified: 1 / (1 - strength)
THICKENING_RADIUS = 1.0  # pixels that the ink grows on every side
THINNING_RADIUS = 0.75  # pixels that the ink shrinks on every side

_ENLARGEMENT = 4  # strokes are a few pixels wide; operations on them work in quarters of a pixel

Split = Literal["train", "test"]


def apply(images: NDArray[np.uint8], context: ContextLike) -> NDArray[np.uint8]:
    """Put digits under a context.

    Args:
        images: (N, 28, 28) or (N, 1, 28, 28), uint8, light ink on black; they are not changed.
        context: the operations, of strength 1; () returns a copy.

    Returns:
        Images of the same shape.

    Raises:
        ValueError: for an unknown concept, a strength other than 1, or images of another shape or dtype.
    """
    strengths = as_context(context).strengths
    if unknown := sorted(set(strengths).difference(CONCEPTS)):
        raise UserValueError(f"This world has no concepts {quoted(unknown)}. It has: {quoted(CONCEPTS)}.")
    if scaled := {name: strength for name, strength in strengths.items() if strength != 1}:
        raise UserValueError(
            f"The operations have one strength, 1; received {scaled}. Leave strengths out of the context."
        )
    gray = images.ndim == 3 or (images.ndim == 4 and images.shape[1] == 1)
    if not gray or images.shape[-2:] != (SIDE, SIDE) or images.dtype != np.uint8:
        raise UserValueError(
            f"Images must be (N, {SIDE}, {SIDE}) or (N, 1, {SIDE}, {SIDE}) of dtype uint8; received "
            f"{images.shape} of {images.dtype}. Resize them, and scale them to 0 ... 255."
        )
    operations = [operation for name, operation in _OPERATIONS.items() if name in strengths]
    changed = images.copy()
    for digit in ProgressBar(changed.reshape(-1, SIDE, SIDE), desc=f"draw {as_context(context)}", unit="image"):
        for operation in operations:
            digit[...] = operation(digit)
    return changed


def load_mnist(folder: str | Path, split: Split = "train") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read images (N, 28, 28), uint8, and classes (N,) from a folder with MNIST's own files, gzipped or not.

    The files are ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, or ``t10k-...`` for the test split.

    Raises:
        FileNotFoundError: for a missing folder or file.
        ValueError: for another split, a file that is not what its name says, or another number of labels than images.
    """
    if split not in ("train", "test"):
        raise UserValueError(f"Unknown split {split!r}. MNIST has: 'train', 'test'.")
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(Path(folder), f"{prefix}-images-idx3-ubyte", (SIDE, SIDE))
    classes = _read_idx(Path(folder), f"{prefix}-labels-idx1-ubyte", ())
    if len(images) != len(classes):
        raise UserValueError(
            f"{str(folder)!r} has {len(images)} images but {len(classes)} labels in its {split} split. "
            "Download both files again."
        )
    return images, classes.astype(np.int64)


def _read_idx(folder: Path, name: str, row_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An array of bytes (N, *row_shape): magic number (type 8, number of axes), length of every axis, values."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{str(folder)!r} has neither {name!r} nor '{name}.gz'. Give the folder with the files of MNIST's original "
            "distribution, under their original names."
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserValueError(f"{str(path)!r} is not a complete gzip file ({error}). Download it again.") from error
    axes = 1 + len(row_shape)
    header = np.frombuffer(content[: 4 * (1 + axes)], ">u4") if len(content) >= 4 * (1 + axes) else np.zeros(1, ">u4")
    values = np.frombuffer(content, np.uint8)[4 * (1 + axes) :]
    shape = tuple(int(length) for length in header[1:])
    if header[0] != 0x0800 + axes or shape[1:] != row_shape or len(values) != math.prod(shape):
        expected = " x ".join(map(str, ("N", *row_shape)))
        raise UserValueError(
            f"{str(path)!r} is not an IDX file of {expected} bytes: its header says type {int(header[0]):#06x} and "
            f"lengths {shape}, {len(values)} bytes follow. Download it again."
        )
    return values.reshape(shape).copy()


def _scaled(digit: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return _moved(digit, np.diag([1 / SCALE, 1 / SCALE]))


def _shear(digit: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return _moved(digit, np.array([[1, SHEAR], [0, 1]]))


def _shift(digit: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return _moved(digit, np.eye(2), SHIFT)


def _moved(
    digit: NDArray[np.uint8], to_source: NDArray[np.floating], by: tuple[int, int] = (0, 0)
) -> NDArray[np.uint8]:
    """Linear map about the center, from points (x right, y down) of the result to the digit's, then a shift."""
    from skimage.transform import AffineTransform, warp

    matrix = np.eye(3)
    matrix[:2, :2] = to_source
    center = np.full(2, (SIDE - 1) / 2)
    matrix[:2, 2] = center - to_source @ (center + np.array(by[::-1]))
    return _to_bytes(warp(digit, AffineTransform(matrix), order=1, preserve_range=True))


def _swelling(digit: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Within the radius R, what is at distance r (1 - strength (1 - r/R)^2) of the center moves to r."""
    from skimage.morphology import skeletonize
    from skimage.transform import warp

    skeleton = np.argwhere(skeletonize(digit > 127))
    if not len(skeleton):
        return digit
    # The middle of the strokes that is nearest to their mean: always in the ink, and inside the image.
    row, column = skeleton[np.square(skeleton - skeleton.mean(axis=0)).sum(axis=1).argmin()]

    def to_source(points: NDArray[np.floating]) -> NDArray[np.floating]:
        offsets = points - [column, row]
        inside = np.clip(1 - np.linalg.norm(offsets, axis=1, keepdims=True) / SWELLING_RADIUS, 0, 1)
        return [column, row] + offsets * (1 - SWELLING_STRENGTH * inside**2)

    return _to_bytes(warp(digit, to_source, order=3, preserve_range=True))


def _thickening(digit: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from skimage.morphology import dilation, disk

    return _reduced(dilation(_enlarged(digit), disk(round(THICKENING_RADIUS * _ENLARGEMENT))))


def _thinning(digit: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from skimage.morphology import dilation, disk, erosion, skeletonize

    large = _enlarged(digit)
    eroded = erosion(large, disk(round(THINNING_RADIUS * _ENLARGEMENT)))
    # Strokes thinner than that stay as lines of about a pixel, instead of breaking up.
    line = dilation(skeletonize(large > 127), disk(_ENLARGEMENT // 2))
    return _reduced(np.maximum(eroded, np.where(line, large, 0)))


def _enlarged(digit: NDArray[np.uint8]) -> NDArray[np.floating]:
    from skimage.transform import resize

    side = SIDE * _ENLARGEMENT
    return np.asarray(resize(digit, (side, side), order=1, preserve_range=True))


def _reduced(large: NDArray[np.floating]) -> NDArray[np.uint8]:
    return _to_bytes(large.reshape(SIDE, _ENLARGEMENT, SIDE, _ENLARGEMENT).mean(axis=(1, 3)))


def _to_bytes(values: Any) -> NDArray[np.uint8]:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


# In the order of application: strokes are changed at their own size, and the shift, last, is not scaled.
_OPERATIONS: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "thinning": _thinning,
    "thickening": _thickening,
    "swelling": _swelling,
    "shear": _shear,
    "scaled": _scaled,
    "shift": _shift,
}
