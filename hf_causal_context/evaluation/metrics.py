"""Distances between sets of samples.

Shapes: N and M samples of any shape, the same for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NUM_PROJECTIONS = 500


def sliced_wasserstein(samples: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance (POT) between samples (N, ...) and a reference (M, ...), flattened.

    The directions depend on the seed only, so that distances of one size of samples can be compared.

    Raises:
        ValueError: for samples of another shape than the reference, or values that are not finite.
    """
    import ot

    if samples.shape[1:] != reference.shape[1:] or not len(samples) or not len(reference):
        raise ValueError(
            f"Samples of shape {tuple(samples.shape)} cannot be compared with a reference of shape "
            f"{tuple(reference.shape)}. Apart from their number they must have the same, non-empty shape."
        )
    x, y = (values.flatten(1).to(torch.float64).cpu().numpy() for values in (samples, reference))
    if not torch.isfinite(samples).all() or not torch.isfinite(reference).all():
        raise ValueError("Samples or reference contain NaN or infinite values.")
    distance: Any = ot.sliced_wasserstein_distance(x, y, n_projections=NUM_PROJECTIONS, seed=seed)
    return float(distance)
