"""Vectors from a dependent causal world through a fixed non-linear mixing: a comparison of methods takes minutes.

The latents are those of the paper's dependent quad world (8 variables, 6 of them intervened on), standardised; the
mixing is z -> Q1 -> 2 Q2 -> leaky ReLU 0.3 -> Q3 -> leaky ReLU 0.5 -> standardise, with orthogonal matrices Q.

Source of the latents: Markham et al., "Intervening to Learn and Compose Causally Disentangled Representations" (CLeaR
2026).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ...contexts import ContextLike
from .linear_gaussian import LinearGaussianModel

CONCEPTS = ("quad1", "quad2", "quad3", "quad4", "size", "orientation")
DIMENSION = 32

_NAMES = ("quad1", "quad2", "quad3", "quad4", "size", "color", "shape", "orientation")
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


def sample_vectors(
    num: int, context: ContextLike = (), seed: int = 0, *, dependent: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Draw vectors (num, 32) and their standardised latents (num, 8) under a context.

    Args:
        num: number of samples.
        context: the concepts intervened on; () is observational.
        seed: the same seed in another context keeps the noise: row i of both is a pair of counterfactuals.
        dependent: False removes all edges between the latents.

    Raises:
        ValueError: for a concept this world does not have.
    """
    latents = _latents(num, context, seed, dependent)
    centre, scale = _observational_moments(dependent)
    return ((_mix(latents) - centre) / scale).astype(np.float32), latents


def latent_model(dependent: bool = True) -> LinearGaussianModel:
    """The structural causal model of the latents, before they are standardised."""
    columns = zip(_NAMES, _INTERVENTION_MEANS, _INTERVENTION_VARIANCES, strict=True)
    interventions = {name: (mean, variance**0.5) for name, mean, variance in columns if name in CONCEPTS}
    deviations = [variance**0.5 for variance in _NOISE_VARIANCES]
    return LinearGaussianModel(_NAMES, _EFFECTS if dependent else {}, deviations, interventions)


def _latents(num: int, context: ContextLike, seed: int, dependent: bool) -> NDArray[np.float64]:
    model = latent_model(dependent)
    return model.sample(num, context, np.random.default_rng(seed)) / model.deviations()


def _mix(latents: NDArray[np.float64]) -> NDArray[np.float64]:
    first, second, third = _rotations()
    hidden = 2 * latents @ first.T @ second.T
    hidden = np.where(hidden > 0, hidden, 0.3 * hidden) @ third.T
    return np.where(hidden > 0, hidden, 0.5 * hidden)


@cache
def _rotations() -> tuple[NDArray[np.float64], ...]:
    widths = (len(_NAMES), DIMENSION, DIMENSION)
    normal = (np.random.default_rng(seed).standard_normal((DIMENSION, width)) for seed, width in enumerate(widths))
    return tuple(np.linalg.qr(matrix)[0] for matrix in normal)


@cache
def _observational_moments(dependent: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    vectors = _mix(_latents(100_000, (), 12345, dependent))
    return vectors.mean(axis=0), vectors.std(axis=0)
