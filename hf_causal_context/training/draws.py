"""Random numbers that belong to samples, not to processes: what makes runs resumable and independent of their layout.

The g-th sample ever drawn (its slot) gets the same noise whatever the batch size, the number of processes and the
number of interruptions. Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Noise of the samples in some slots; successive calls give new numbers.

    Args:
        seed: of the run.
        slots: the B samples' positions in the run.
    """

    def __init__(self, seed: int, slots: Sequence[int]) -> None:
        states = (np.random.SeedSequence((seed, slot)).generate_state(1, np.uint64)[0] for slot in slots)
        self._generators = [torch.Generator().manual_seed(int(state >> 1)) for state in states]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape), float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])

    def integers(self, stop: int) -> Tensor:
        """Whole numbers 0 <= n < stop, (B,), int64 on the CPU."""
        return torch.cat([torch.randint(stop, (1,), generator=generator) for generator in self._generators])
