"""Digits under morphological operations: each does what its name says, and MNIST's files are read or refused."""

import gzip
import struct

import numpy as np
import pytest

from examples.worlds import morphology
from examples.worlds.morphology import CONCEPTS, apply, load_mnist
from hf_causal_context.data.worlds.digits import sample_digits


@pytest.fixture(scope="module")
def digits():
    """Digits like MNIST's: 28 x 28, within a margin, strokes of a few pixels."""
    images, _, _ = sample_digits(30, "size", seed=0)  # small ones leave a margin
    return np.ascontiguousarray(images[:, 2:30, 2:30])


def moments(images):
    """Mass, center (row, column), deviations (row, column) and shear to the right of every image."""
    weights = images.astype(float)
    y, x = np.mgrid[:28, :28]
    mass = weights.sum(axis=(1, 2))
    rows, columns = ((weights * axis).sum(axis=(1, 2)) / mass for axis in (y, x))
    dy, dx = y - rows[:, None, None], x - columns[:, None, None]
    yy, xx, xy = ((weights * product).sum(axis=(1, 2)) / mass for product in (dy * dy, dx * dx, dx * dy))
    return mass, rows, columns, yy**0.5, xx**0.5, -xy / yy


def test_geometry(digits):
    mass, rows, columns, high, wide, shear = moments(digits)
    _, _, _, scaled_high, scaled_wide, scaled_shear = moments(apply(digits, "scaled"))
    assert scaled_high / high == pytest.approx(morphology.SCALE, abs=0.04)
    assert scaled_wide / wide == pytest.approx(morphology.SCALE, abs=0.04)
    assert scaled_shear == pytest.approx(shear, abs=0.05)
    sheared_mass, sheared_rows, _, sheared_high, _, sheared = moments(apply(digits, "shear"))
    assert sheared - shear == pytest.approx(morphology.SHEAR, abs=0.05)
    assert sheared_mass == pytest.approx(mass, rel=0.03)
    assert sheared_rows == pytest.approx(rows, abs=0.1)
    assert sheared_high == pytest.approx(high, rel=0.02)
    down, right = morphology.SHIFT
    assert np.array_equal(apply(digits, "shift")[:, down:, right:], digits[:, :-down, :-right])
    assert not apply(digits, "shift")[:, :down].any()
    _, shifted_rows, shifted_columns, *_ = moments(apply(digits, "shift"))
    assert shifted_rows - rows == pytest.approx(down, abs=0.2)
    assert shifted_columns - columns == pytest.approx(right, abs=0.2)


def test_strokes(digits):
    thick, thin = apply(digits, "thickening"), apply(digits, "thinning")
    mass = moments(digits)[0]
    assert (moments(thick)[0] / mass).min() > 1.3
    assert (moments(thin)[0] / mass).max() < 0.9
    # ink appears around the ink and disappears from its edge: nothing is moved
    assert (thick.astype(int) - digits).min() > -80
    assert (thin.astype(int) - digits).max() < 80
    stroke = np.zeros((1, 28, 28), np.uint8)
    stroke[0, 6:22, 12:16] = 255

    def width(images):
        return images[0, 14].sum() / 255

    assert width(apply(stroke, "thickening")) == pytest.approx(4 + 2 * morphology.THICKENING_RADIUS, abs=0.3)
    assert width(apply(stroke, "thinning")) == pytest.approx(4 - 2 * morphology.THINNING_RADIUS, abs=0.3)
    hair = np.zeros((1, 28, 28), np.uint8)
    hair[0, 6:22, 14] = 255
    assert (apply(hair, "thinning")[0, 8:20].max(axis=1) > 127).all()  # it does not break up


def test_swelling_is_local_and_magnifies(digits):
    bar = np.zeros((1, 28, 28), np.uint8)
    bar[0, 2:26, 12:15] = 255
    swollen = apply(bar, "swelling")
    widths = swollen[0].sum(axis=1) / 255
    assert widths[13:15].max() > 4.5
    assert np.array_equal(swollen[0, :3], bar[0, :3])
    assert np.array_equal(swollen[0, 25:], bar[0, 25:])
    assert (moments(apply(digits, "swelling"))[0] / moments(digits)[0]).mean() > 1.02
    empty = np.zeros((1, 28, 28), np.uint8)
    for concept in CONCEPTS:
        assert not apply(empty, concept).any()


def test_joint_contexts_apply_one_operation_after_the_other(digits):
    images = digits[:6]
    original = images.copy()
    assert np.array_equal(apply(images, "scaled+thinning"), apply(apply(images, "thinning"), "scaled"))
    assert np.array_equal(apply(images, "shift+shear"), apply(apply(images, "shear"), "shift"))
    assert np.array_equal(apply(images, "shift+shear"), apply(images, ("shear", "shift")))
    results = [apply(images, context) for context in ("", *CONCEPTS)]
    for i, one in enumerate(results):
        assert one.dtype == np.uint8
        for other in results[i + 1 :]:
            assert (one != other).any(axis=(1, 2)).all()
    assert np.array_equal(images, original)
    assert np.array_equal(results[0], original)
    assert results[0] is not images
    assert np.array_equal(apply(images[:, None], "shear"), apply(images, "shear")[:, None])
    assert set(morphology._OPERATIONS) == set(CONCEPTS)


def test_errors_of_apply(digits):
    with pytest.raises(ValueError, match="This world has no concepts 'swel'. It has: 'scaled', .*'thinning'"):
        apply(digits, "swel")
    with pytest.raises(ValueError, match="one strength, 1; received {'shear': 0.5}"):
        apply(digits, {"shear": 0.5})
    for wrong in (digits[0], digits[:, :20], digits / 255, np.zeros((2, 3, 28, 28), np.uint8)):
        with pytest.raises(ValueError, match="Images must be \\(N, 28, 28\\) or .*uint8; received"):
            apply(wrong, "shear")


def write_idx(path, values, magic=None):
    header = struct.pack(f">{1 + values.ndim}I", magic or 0x0800 + values.ndim, *values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_is_read(tmp_path, digits, ending):
    labels = np.arange(30, dtype=np.uint8) % 10
    write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", digits)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{ending}", labels)
    images, classes = load_mnist(tmp_path)
    assert np.array_equal(images, digits)
    assert images.flags.writeable
    assert classes.dtype == np.int64
    assert np.array_equal(classes, labels)
    with pytest.raises(FileNotFoundError, match="neither 't10k-images-idx3-ubyte' nor 't10k-images-idx3-ubyte.gz'"):
        load_mnist(tmp_path, "test")


def test_ill_formed_files_are_errors(tmp_path, digits):
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    write_idx(labels, np.zeros(30, np.uint8))
    with pytest.raises(ValueError, match="Unknown split 'validation'. MNIST has: 'train', 'test'"):
        load_mnist(tmp_path, "validation")
    for content in (b"", b"\0\0", digits.tobytes()[:2000]):
        images.write_bytes(content)
        with pytest.raises(ValueError, match="not an IDX file of N x 28 x 28 bytes"):
            load_mnist(tmp_path, "test")
    write_idx(images, digits[:, :20])
    with pytest.raises(ValueError, match="lengths \\(30, 20, 28\\), 16800 bytes follow. Download it again"):
        load_mnist(tmp_path, "test")
    write_idx(images, digits, magic=0x0D03)
    with pytest.raises(ValueError, match="its header says type 0x0d03"):
        load_mnist(tmp_path, "test")
    write_idx(images, digits[:-1])
    with pytest.raises(ValueError, match="has 29 images but 30 labels in its test split"):
        load_mnist(tmp_path, "test")
    images.unlink()
    packed = tmp_path / "t10k-images-idx3-ubyte.gz"
    write_idx(packed, digits)
    for content in (packed.read_bytes()[:-20], b"<html>not found</html>"):
        packed.write_bytes(content)
        with pytest.raises(ValueError, match="is not a complete gzip file"):
            load_mnist(tmp_path, "test")
