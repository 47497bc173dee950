"""Distances of samples beside the two numbers that give them a meaning: real rows, and the base.

Shapes: N and M rows of any shape, the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .features import frechet_and_kernel_distance
from .metrics import Estimate, sliced_wasserstein
from .results import Distances

# A base nearer than this to its floor leaves no gap to close: the ratio would be noise.
_SMALLEST_GAP = 0.1


def compare(
    samples: Sequence[Tensor],
    base: Sequence[Tensor],
    real: Tensor,
    num: int,
    seed: int,
    empty: Sequence[Tensor] | None = None,
) -> Distances:
    """Sliced Wasserstein distances per seed group, `num` rows each from the remaining real rows.

    Every group has another split of the real rows, so that the intervals hold what the choice of the reference does.
    """
    distances = []
    for group, (own, of_base) in enumerate(zip(samples, base, strict=True)):
        floor, reference = _split(real, num, seed + group)
        measured = [own, floor, of_base] if empty is None else [own, floor, of_base, empty[group]]
        distances.append([sliced_wasserstein(rows[:num], reference) for rows in measured])
    return _distances(*(Estimate.of(column) for column in zip(*distances, strict=True)))


def compare_features(samples: Tensor, base: Tensor, real: Tensor, seed: int) -> tuple[Distances, Distances]:
    """FID and KID of features (N, D) of all seed groups together, in as many rows as half the real ones at most."""
    num = min(len(samples), len(real) // 2)
    floor, reference = _split(real, num, seed)
    pairs = [frechet_and_kernel_distance(rows[:num], reference) for rows in (samples, floor, base)]
    frechet, kernel = ([Estimate(pair[i]) for pair in pairs] for i in (0, 1))
    return _distances(*frechet), _distances(*kernel)


def gap_closed(samples: float, floor: float, base: float) -> float | None:
    """(base - samples) / (base - floor); None where the base is at the floor, give or take a tenth."""
    return (base - samples) / (base - floor) if base - floor > _SMALLEST_GAP * abs(floor) else None


def means(items: Sequence[Distances]) -> tuple[float, float, float]:
    """Samples, floor and base, averaged over contexts."""
    rows = [(item.samples.mean, item.floor.mean, item.base.mean) for item in items]
    samples, floor, base = np.mean(rows, axis=0).tolist()
    return samples, floor, base


def _split(real: Tensor, num: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    return real[order[:num]], real[order[num:]]


def _distances(samples: Estimate, floor: Estimate, base: Estimate, empty: Estimate | None = None) -> Distances:
    return Distances(samples, floor, base, gap_closed(samples.mean, floor.mean, base.mean), empty)
