"""Random numbers of torch's own generators, drawn without a trace in what others draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the body, torch draws by a seed on the CPU and a device; afterwards its random states are as before.

    Without a seed it goes on from the present states.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            # `torch.manual_seed` seeds all GPUs, too, whose states nothing restores where none is the device.
            seeds = torch.default_generator if device.type == "cpu" else torch
            seeds.manual_seed(seed)
        yield
