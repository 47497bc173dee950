"""Distances between sets of samples, and what several seeds say about a number.

Shapes: N and M samples of any shape, the same for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserValueError

NUM_PROJECTIONS = 500


@dataclass(frozen=True)
class Estimate:
    """A mean over seed groups; with two or more of them half the width of its 95 % confidence interval (t)."""

    mean: float
    half_width: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from one value for each seed group."""
        if len(values) < 2:
            return cls(float(values[0]))
        from scipy.special import stdtrit  # a dependency of POT

        deviation = float(np.std(values, ddof=1)) / len(values) ** 0.5
        return cls(float(np.mean(values)), float(stdtrit(len(values) - 1, 0.975)) * deviation)


def beyond_base(share: float, base: float) -> float | None:
    """Return the part of a share that the base's own rate does not explain: (share - base) / (1 - base).

    1 if all samples count, 0 for as many as in samples of the base, negative for fewer. None where all of the base's
    count, so that nothing can go beyond it.
    """
    return (share - base) / (1 - base) if base < 1 else None


def sliced_wasserstein(
    samples: Tensor, reference: Tensor, seed: int = 0, num_projections: int = NUM_PROJECTIONS
) -> float:
    """Sliced 2-Wasserstein distance (POT) between samples (N, ...) and a reference (M, ...), flattened.

    The directions depend on the seed only, so that distances of one size of samples can be compared.

    Raises:
        ValueError: for samples of another shape than the reference, or values that are not finite.
    """
    import ot

    if samples.shape[1:] != reference.shape[1:] or not len(samples) or not len(reference):
        raise UserValueError(
            f"Samples of shape {tuple(samples.shape)} cannot be compared with a reference of shape "
            f"{tuple(reference.shape)}. Apart from their number they must have the same, non-empty shape."
        )
    x, y = (values.flatten(1).to(torch.float64).cpu().numpy() for values in (samples, reference))
    if not torch.isfinite(samples).all() or not torch.isfinite(reference).all():
        raise UserValueError("Samples or reference contain NaN or infinite values.")
    distance: Any = ot.sliced_wasserstein_distance(x, y, n_projections=num_projections, seed=seed)
    return float(distance)


def mean_pairwise_distance(samples: Tensor) -> float:
    """Mean Euclidean distance between two of the samples (N, ...), N > 1: how diverse they are."""
    return float(torch.pdist(samples.flatten(1).float()).mean())
