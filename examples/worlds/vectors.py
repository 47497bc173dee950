"""Vectors from a dependent causal world through a fixed non-linear mixing: a comparison of methods takes minutes.

The latents are those of the paper's dependent quad world (8 variables, 6 of them intervened on), standardized; the
mixing is z -> Q1 -> 2 Q2 -> leaky ReLU 0.3 -> Q3 -> leaky ReLU 0.5 -> standardize, with orthogonal matrices Q.

Source of the latents: Markham et al., "Intervening to Learn and Compose Causally Disentangled Representations" (CLeaR
2026).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from hf_causal_context.contexts import ContextLike

from .quad import CONCEPTS, VARIABLES, latent_model, standardized_latents

__all__ = ["CONCEPTS", "DIMENSION", "latent_model", "sample_vectors"]

DIMENSION = 32


def sample_vectors(
    num: int, context: ContextLike = (), seed: int = 0, *, dependent: bool = True, mixing_seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Draw vectors (num, 32) and their standardized latents (num, 8) under a context.

    Args:
        num: number of samples.
        context: the concepts intervened on; () is observational.
        seed: the same seed in another context keeps the noise: row i of both is a pair of counterfactuals.
        dependent: False removes all edges between the latents.
        mixing_seed: of the orthogonal matrices; another one is another world of the same latents.

    Raises:
        ValueError: for a concept this world does not have.
    """
    latents = standardized_latents(num, context, seed, dependent=dependent)
    center, scale = _observational_moments(dependent, mixing_seed)
    return ((_mix(latents, mixing_seed) - center) / scale).astype(np.float32), latents


def _mix(latents: NDArray[np.float64], mixing_seed: int) -> NDArray[np.float64]:
    first, second, third = _rotations(mixing_seed)
    hidden = 2 * latents @ first.T @ second.T
    hidden = np.where(hidden > 0, hidden, 0.3 * hidden) @ third.T
    return np.where(hidden > 0, hidden, 0.5 * hidden)


@cache
def _rotations(mixing_seed: int) -> tuple[NDArray[np.float64], ...]:
    widths = (len(VARIABLES), DIMENSION, DIMENSION)
    seeds = (100 * mixing_seed + i for i in range(len(widths)))
    normal = (
        np.random.default_rng(seed).standard_normal((DIMENSION, width))
        for seed, width in zip(seeds, widths, strict=True)
    )
    return tuple(np.linalg.qr(matrix)[0] for matrix in normal)


@cache
def _observational_moments(dependent: bool, mixing_seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    vectors = _mix(standardized_latents(100_000, seed=12345, dependent=dependent), mixing_seed)
    return vectors.mean(axis=0), vectors.std(axis=0)
