"""The quad world: its causal truth, images that show it, and readings of them."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from examples.worlds.quad import (
    CONCEPTS,
    HELD_OUT,
    VARIABLES,
    latent_model,
    read_quad,
    sample_quad,
    standardized_latents,
)
from hf_causal_context import Context

QUAD1, QUAD2, QUAD3, QUAD4, SIZE, COLOR, SHAPE, ORIENTATION = range(8)
READ = (*VARIABLES[:5], "orientation")  # what read_quad returns
# rows and columns of quad1 .. quad4, 64 pixels: lower left, lower right, upper left, upper right
LOW, HIGH = slice(0, 32), slice(32, 64)
QUARTERS = [(HIGH, LOW), (HIGH, HIGH), (LOW, LOW), (LOW, HIGH)]


@pytest.fixture(scope="module")
def dependent():
    return sample_quad(2000, seed=1)


def test_the_concepts_and_the_held_out_pairs():
    assert CONCEPTS == ("quad1", "quad2", "quad3", "quad4", "size", "orientation")
    pairs = "quad1+quad2 quad1+quad3 quad1+quad4 quad1+size quad1+orientation"
    pairs += " quad2+quad3 quad2+quad4 quad2+size quad2+orientation"
    assert [Context.parse(pair) for pair in pairs.split()] == list(HELD_OUT)
    assert set(latent_model().interventions) == set(CONCEPTS)


@pytest.mark.parametrize("world", [True, False])
def test_observational_values_are_uniform(world):
    _, values = sample_quad(4000, seed=3, size=8, dependent=world)
    assert values.shape == (4000, 8)
    for column in range(8):
        assert kstest(values[:, column], "uniform").statistic < 0.03


def test_edges_correlate_neighbors_and_the_independent_world_has_none():
    _, values = sample_quad(20_000, size=8)
    correlations = np.corrcoef(values.T)
    # From the structural equations, with total effects: the signs of strong dependencies.
    assert correlations[QUAD2, QUAD3] > 0.3
    assert correlations[QUAD1, QUAD2] < -0.3
    assert correlations[QUAD3, QUAD4] < -0.3
    assert correlations[COLOR, SHAPE] < -0.3
    assert correlations[SIZE, COLOR] > 0.3
    assert correlations[SHAPE, ORIENTATION] > 0.3
    assert correlations[QUAD4, ORIENTATION] == pytest.approx(0, abs=0.03)
    _, values = sample_quad(20_000, "quad1+size", size=8, dependent=False)
    assert np.abs(np.corrcoef(values.T) - np.eye(8)).max() < 0.03


def test_an_intervention_moves_its_concept_and_its_effects_only():
    def moved(context, world=True):
        _, before = sample_quad(50, (), 5, size=8, dependent=world)
        _, after = sample_quad(50, context, 5, size=8, dependent=world)
        return [name for name, changed in zip(VARIABLES, (before != after).any(axis=0), strict=True) if changed]

    assert moved("quad1") == ["quad1"]
    assert moved("quad3") == ["quad1", "quad2", "quad3"]
    assert moved("orientation") == ["quad1", "quad2", "size", "color", "shape", "orientation"]
    for concept in CONCEPTS:
        assert moved(concept, world=False) == [concept]


def test_an_intervention_has_the_published_mean_and_variance():
    latents = standardized_latents(50_000, "quad4+size") * latent_model().deviations()
    assert latents[:, [QUAD4, SIZE]].mean(axis=0) == pytest.approx([-1.96578519, 1.0117071], abs=0.03)
    assert latents[:, [QUAD4, SIZE]].var(axis=0) == pytest.approx([1.1021785, 1.30511067], rel=0.03)


def test_quarters_have_their_hues_and_the_shape_is_in_the_middle(dependent):
    images, values = dependent
    assert images.shape == (2000, 3, 64, 64)
    assert images.dtype == np.uint8
    knots = np.linspace(0, 1, 6)
    path = np.array([[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255]])

    def hue(u):
        return np.stack([np.interp(u, knots, channel) for channel in path.T], axis=1)[..., None, None]

    small = 0.2 + 0.8 * values[:, SIZE] < 0.3  # then the quarters reach the middle lines of the image
    for column, (rows, columns) in enumerate(QUARTERS):
        quarter = images[..., rows, columns]
        inwards = [slice(None, None, -1) if part == LOW else slice(None) for part in (rows, columns)]
        quarter = quarter[..., inwards[0], inwards[1]]  # row 0 and column 0 next to the middle
        assert np.abs(quarter[..., 25:, 25:] - hue(values[:, column])).max() <= 0.51
        assert np.abs(quarter[small][..., 12:] - hue(values[small, column])).max() <= 0.51
        assert np.abs(quarter[small][..., 12:, :] - hue(values[small, column])).max() <= 0.51
    assert np.abs(images[..., 31:33, 31:33] - hue(values[:, COLOR])).max() <= 0.51


def shape_area(image):
    """Pixels that the shape covers in an image whose quarters are as in the same image's corners."""
    corners = [image[:, -1, 0], image[:, -1, -1], image[:, 0, 0], image[:, 0, -1]]
    color = image[:, 31, 31].astype(float)
    area, moments = 0.0, np.zeros(2)
    for (rows, columns), background in zip(QUARTERS, corners, strict=True):
        contrast = color - background
        share = np.tensordot(contrast, image[:, rows, columns] - background[:, None, None].astype(float), 1)
        share = share / (contrast @ contrast)
        y, x = np.mgrid[rows, columns]
        area += share.sum()
        moments += [(share * x).sum(), (share * y).sum()]
    return area, moments / area


def test_shapes_have_the_areas_of_their_geometry(dependent):
    images, values = dependent
    corners = np.stack([images[:, :, -1, 0], images[:, :, -1, -1], images[:, :, 0, 0], images[:, :, 0, -1]], 1)
    contrast = np.abs(images[:, None, :, 31, 31].astype(float) - corners).sum(axis=2).min(axis=1)
    factors = {0: np.pi / 4, 1: 1.0, 2: 3 * 0.75**0.5 / 8, 3: np.pi / 8}  # area / diameter^2
    shapes = np.rint(3 * values[:, SHAPE])
    for shape, factor in factors.items():
        rows = np.flatnonzero((shapes == shape) & (contrast > 100) & (values[:, SIZE] < 0.7))[:10]
        assert len(rows) == 10
        for row in rows:
            area, center = shape_area(images[row])
            diameter = 48 * (0.2 + 0.8 * values[row, SIZE])
            assert area == pytest.approx(factor * diameter**2, rel=0.04)
            assert center == pytest.approx([31.5, 31.5], abs=0.4)


def test_orientation_turns_counter_clockwise():
    from examples.worlds import quad

    def coverage(shape, turn):
        return quad._coverage(np.array([shape]), np.array([0.8]), np.array([turn]), 64)[0]

    triangle, square, ellipse = 2, 1, 3
    up = coverage(triangle, 0.0)
    assert up[31 - 16, 31] == 1  # the tip is above, the base below
    assert up[31 + 12, 31] == 0
    left = coverage(triangle, 0.25)
    assert left[31, 31 - 16] == 1
    assert left == pytest.approx(np.rot90(up), abs=1e-4)
    assert coverage(square, 0.25) == pytest.approx(coverage(square, 0.0), abs=1e-4)
    lying = coverage(ellipse, 0.0)
    assert (lying[31] > 0.5).sum() == pytest.approx(2 * (lying[:, 31] > 0.5).sum(), abs=2)
    assert coverage(ellipse, 0.25) == pytest.approx(lying.T, abs=1e-4)
    for shape in range(4):
        assert coverage(shape, 1.0) == pytest.approx(coverage(shape, 0.0), abs=1e-4)


def test_do_size_and_do_quad1_change_only_their_pixels():
    before, values = sample_quad(200, seed=2)
    resized, new_values = sample_quad(200, "size", seed=2)
    larger = 24 * (0.2 + 0.8 * np.maximum(values, new_values)[:, SIZE])
    y, x = np.mgrid[:64, :64] - 31.5
    reach = np.where(np.rint(3 * values[:, SHAPE]) == 1, 2**0.5, 1) * larger + 1  # corners of a square
    far = np.hypot(x, y) > reach[:, None, None]
    changed = (before != resized).any(axis=1)
    assert not (changed & far).any()
    assert changed.any(axis=(1, 2)).mean() > 0.9
    recolored, _ = sample_quad(200, "quad1", seed=2)
    changed = (before != recolored).any(axis=1)
    assert changed[:, 57:, :7].all(axis=(1, 2)).mean() > 0.9
    changed[:, 32:, :32] = False
    assert not changed.any()


def test_readings_are_the_values(dependent):
    images, values = dependent
    read = read_quad(images)
    assert tuple(read) == READ
    for name in READ[:4]:
        assert read[name] == pytest.approx(values[:, VARIABLES.index(name)], abs=0.001)
    errors = np.abs(read["size"] - values[:, SIZE])
    assert errors.mean() < 0.005
    assert np.quantile(errors, 0.99) < 0.03
    as_tensor = read_quad(torch.from_numpy(images[:50]).float() / 255)
    for name in READ:
        assert as_tensor[name] == pytest.approx(read[name][:50], abs=1e-4, nan_ok=name == "orientation")


@pytest.mark.parametrize("side", [16, 64])
def test_orientations_are_read_up_to_the_symmetry_of_the_shape(side):
    images, values = sample_quad(1000, seed=2, size=side)
    shapes = np.rint(3 * values[:, SHAPE]).astype(int)
    read = read_quad(images)["orientation"]
    assert np.isnan(read[shapes == 0]).all()  # circles
    for shape, times in ((1, 4), (2, 3), (3, 2)):  # squares, triangles, ellipses
        turned = (times * values[shapes == shape, ORIENTATION]) % 1
        errors = np.abs(read[shapes == shape] - turned)
        errors = np.minimum(errors, 1 - errors)[np.isfinite(errors)]
        assert len(errors) > 0.99 * len(turned)
        # Templates are 1/8 apart, or less.
        assert np.quantile(errors, 0.9) < 1 / 16


def test_sizes_are_read_where_the_shape_has_the_hue_of_a_quarter():
    from examples.worlds import quad

    rng = np.random.default_rng(0)
    values = rng.random((400, 8)).astype(np.float32)
    values[np.arange(400), np.arange(400) % 4] = values[:, COLOR]
    images = np.empty((400, 3, 64, 64), np.uint8)
    quad._draw(values, images)
    errors = np.abs(read_quad(images)["size"] - values[:, SIZE])
    assert errors.mean() < 0.01
    values[:, :4] = values[:, [COLOR]]
    quad._draw(values, images)
    assert np.isnan(read_quad(images)["size"]).all()


def test_sizes_are_read_from_blurred_images(dependent):
    from scipy.ndimage import gaussian_filter

    images, values = dependent
    blurred = gaussian_filter(images[:500] / 255.0, (0, 0, 1.5, 1.5))
    blurred += np.random.default_rng(0).normal(0, 0.03, blurred.shape)
    read = read_quad(blurred)
    assert np.abs(read["size"] - values[:500, SIZE]).mean() < 0.02
    assert np.abs(read["quad1"] - values[:500, QUAD1]).mean() < 0.01


@pytest.mark.parametrize("side", [32, 33, 48, 128])
def test_other_sizes_show_the_same(side):
    images, values = sample_quad(200, seed=1, size=side)
    assert images.shape == (200, 3, side, side)
    assert np.array_equal(values, sample_quad(200, seed=1)[1])
    read = read_quad(images)
    for name in READ[:4]:
        assert read[name] == pytest.approx(values[:, VARIABLES.index(name)], abs=0.001)
    assert np.abs(read["size"] - values[:, SIZE]).mean() < 0.01


def test_seeds():
    images, values = sample_quad(130, seed=3)
    again, same = sample_quad(130, seed=3)
    assert np.array_equal(images, again)
    assert np.array_equal(values, same)
    assert not np.array_equal(values, sample_quad(130, seed=4)[1])
    assert sample_quad(0)[0].shape == (0, 3, 64, 64)
    assert read_quad(sample_quad(0)[0])["size"].shape == (0,)


def test_errors():
    with pytest.raises(ValueError, match="This world has no concepts 'color'. It has: 'quad1', .*'orientation'"):
        sample_quad(5, "color")
    with pytest.raises(ValueError, match="Images of 7 pixels a side are too small: .* Give 8 or more"):
        sample_quad(5, size=7)
    with pytest.raises(ValueError, match="square RGB images .* received the shape \\(2, 64, 64, 3\\)"):
        read_quad(np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="dtype uint8, or floating point in \\[0, 1\\]; received int64"):
        read_quad(np.zeros((2, 3, 64, 64), np.int64))
