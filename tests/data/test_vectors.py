"""The vector world: the published latents, and a mixing that keeps what they are."""

import numpy as np
import pytest

from examples.worlds.vectors import CONCEPTS, DIMENSION, latent_model, sample_vectors

QUAD1, QUAD2, QUAD3, QUAD4, SIZE, COLOR, SHAPE, ORIENTATION = range(8)


def test_the_observational_latents_follow_their_equations():
    raw = latent_model().sample(200_000, (), np.random.default_rng(0))
    assert raw.mean(axis=0) == pytest.approx(np.zeros(8), abs=0.05)
    assert raw.std(axis=0) == pytest.approx(latent_model().deviations(), rel=0.01)
    residual = raw[:, QUAD1] - raw[:, [QUAD2, QUAD4, COLOR, ORIENTATION]] @ [-1.23, 1.34, -0.95, 1.12]
    assert residual.var() == pytest.approx(1.3855493, rel=0.02)
    regression = np.linalg.lstsq(raw[:, [COLOR, ORIENTATION]], raw[:, SIZE], rcond=None)[0]
    assert regression == pytest.approx([1.67, -0.81], abs=0.02)


def test_an_intervention_replaces_one_mechanism():
    raw = latent_model().sample(100_000, "quad3", np.random.default_rng(0))
    assert raw[:, QUAD3].mean() == pytest.approx(-1.60596209, abs=0.02)
    assert raw[:, QUAD3].var() == pytest.approx(1.57343313, rel=0.03)
    assert np.corrcoef(raw[:, QUAD4], raw[:, QUAD3])[0, 1] == pytest.approx(0, abs=0.02)
    assert raw[:, QUAD2].mean() == pytest.approx(1.56 * -1.60596209, abs=0.05)  # the effect follows
    assert raw[:, QUAD4].mean() == pytest.approx(0, abs=0.03)  # the cause does not


def test_without_edges_nothing_depends_on_anything():
    _, latents = sample_vectors(50_000, "quad1+size", dependent=False)
    correlations = np.corrcoef(latents.T) - np.eye(8)
    assert np.abs(correlations).max() < 0.03
    _, dependent = sample_vectors(50_000)
    assert np.abs(np.corrcoef(dependent.T) - np.eye(8)).max() > 0.5


@pytest.mark.parametrize(("dependent", "mixing_seed"), [(True, 0), (False, 0), (True, 7)])
def test_vectors_are_standardized_and_determine_their_latents(dependent, mixing_seed):
    vectors, latents = sample_vectors(20_000, seed=1, dependent=dependent, mixing_seed=mixing_seed)
    assert vectors.shape == (20_000, DIMENSION)
    assert vectors.dtype == np.float32
    assert vectors.mean(axis=0) == pytest.approx(np.zeros(DIMENSION), abs=0.05)
    assert vectors.std(axis=0) == pytest.approx(np.ones(DIMENSION), abs=0.05)
    # near each other in one space, near in the other: the mixing is invertible
    pairs = np.linalg.norm(vectors[:2000:2] - vectors[1:2000:2], axis=1)
    latent_pairs = np.linalg.norm(latents[:2000:2] - latents[1:2000:2], axis=1)
    assert (pairs / latent_pairs).min() > 0.3


def test_seeds_and_contexts():
    one, _ = sample_vectors(50, seed=3)
    assert np.array_equal(one, sample_vectors(50, seed=3)[0])
    assert not np.array_equal(one, sample_vectors(50, seed=4)[0])
    mixed, latents = sample_vectors(50, seed=3, mixing_seed=1)
    assert not np.allclose(one, mixed, atol=0.5)
    assert np.array_equal(latents, sample_vectors(50, seed=3)[1])
    _, observed = sample_vectors(50, seed=3)
    _, moved = sample_vectors(50, "size", seed=3)
    changed = (observed != moved).any(axis=0)
    assert changed.tolist() == [name == "size" for name in latent_model().names]
    assert set(CONCEPTS) < set(latent_model().names)
    with pytest.raises(ValueError, match="This world has no concepts 'color'. It has: 'quad1', .*'orientation'"):
        sample_vectors(5, "color")
