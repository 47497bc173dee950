"""Random numbers that belong to samples, not to processes: what makes runs resumable and independent of their layout.

The g-th sample ever drawn (its slot) gets the same noise whatever the batch size, the number of processes and the
number of interruptions. Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor


def generator_of(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose seed is a function of the numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


CAPTION, FLIP, EDIT = 1, 2, 3


def chance_of(seed: int, slot: int, matter: int) -> np.random.Generator:
    """Return what decides a matter of one sample besides its noise, which is the same whatever is decided."""
    return np.random.default_rng((seed, slot, matter))


class Draws:
    """Noise of the samples in some slots; successive calls give new numbers.

    Args:
        seed: of the run.
        slots: the B samples' positions in the run.
    """

    def __init__(self, seed: int, slots: Sequence[int]) -> None:
        self._generators = [generator_of(seed, slot) for slot in slots]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape), float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])

    def integers(self, stop: int) -> Tensor:
        """Whole numbers 0 <= n < stop, (B,), int64 on the CPU."""
        return torch.cat([torch.randint(stop, (1,), generator=generator) for generator in self._generators])


class LevelDraws(Draws):
    """Draws for comparisons: the noise of the slots, but at time steps that are given.

    Args:
        levels: 0 < level < 1 for each sample, as a share of what training draws the time step from: 0.5 is its median.
    """

    def __init__(self, seed: int, slots: Sequence[int], levels: Sequence[float]) -> None:
        super().__init__(seed, slots)
        self._levels = levels

    def normal(self, *shape: int) -> Tensor:
        """Without a shape, the time of a flow: normal quantiles (B,) of the levels."""
        if shape:
            return super().normal(*shape)
        return torch.tensor([NormalDist().inv_cdf(level) for level in self._levels])

    def integers(self, stop: int) -> Tensor:
        """Return the time step of a diffusion, (B,)."""
        return torch.tensor([int(level * stop) for level in self._levels])
