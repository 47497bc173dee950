"""The base of the composition benchmark: a flow-matching network for vectors, its training loop and its sampler.

Shapes: B samples, D dimensions, H hidden features.
"""

import copy
import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import trange

Velocity = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """h + second(silu(first(norm(h)) + time(e)))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.time = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        return hidden + self.second(nn.functional.silu(self.first(self.norm(hidden)) + self.time(embedded)))


class VectorFlow(nn.Module):
    """Velocity (B, D) at x (B, D) and time (B,), 0 data to 1 noise: four residual blocks of width 256."""

    LINEARS = ("embed", "in_proj", "first", "time", "second", "out_proj")

    def __init__(self, dimension: int = 32, width: int = 256, num_blocks: int = 4) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2 * math.pi * 2.0 ** torch.arange(-2, 6), persistent=False)
        self.embed = nn.Linear(2 * len(self.frequencies), width)
        self.in_proj = nn.Linear(dimension, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, dimension)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * self.frequencies
        embedded = nn.functional.silu(self.embed(torch.cat([angles.sin(), angles.cos()], dim=1)))
        hidden = self.in_proj(x)
        for block in self.blocks:
            hidden = block(hidden, embedded)
        return self.out_proj(self.norm(hidden))


def noised(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Points x = (1 - t) clean + t noise at logit-normal times, the times (B,), and the velocities there.

    The random numbers are drawn on the CPU, the same for every device.
    """
    time = torch.sigmoid(torch.randn(len(clean), generator=generator)).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    return (1 - time[:, None]) * clean + time[:, None] * noise, time, noise - clean


def optimize(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], steps: int, learning_rate: float, name: str
) -> None:
    """AdamW with warm-up and a cosine; in the end the parameters are their moving average."""
    parameters = list(parameters)
    averages = [copy.deepcopy(parameter.data) for parameter in parameters]
    fused = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4, fused=fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    for step in trange(steps, desc=name, leave=False, mininterval=5):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.data, 1 - min(0.995, (step + 1) / (step + 10)))
    for average, parameter in zip(averages, parameters, strict=True):
        parameter.data.copy_(average)


def train_base(model: VectorFlow, observational: Tensor, steps: int, batch_size: int = 512) -> None:
    """Fit a base to observational vectors (N, D) on its device."""
    generator = torch.Generator().manual_seed(0)
    observational = observational.to(model.embed.weight.device)

    def loss() -> Tensor:
        rows = torch.randint(len(observational), (batch_size,), generator=generator)
        noisy, time, velocity = noised(observational[rows], generator)
        return (model(noisy, time) - velocity).square().mean()

    optimize(model.parameters(), loss, steps, 1e-3, "base")


@torch.no_grad()
def sample(
    velocity: Velocity,
    num: int,
    seed: int,
    *,
    dimension: int = 32,
    steps: int = 16,
    corrections: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Vectors (num, dimension) on the CPU from noise, by second-order Adams-Bashforth steps.

    `corrections` Langevin steps follow each of them but the last, at its noise level and with steps relative to the
    score (Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021).
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, dimension, generator=generator).to(device)
    times = torch.linspace(1, 0, steps + 1).tolist()
    previous = None
    for now, following in pairwise(times):
        v = velocity(x, torch.full((num,), now, device=device))
        x = x + (following - now) * (v if previous is None else 1.5 * v - 0.5 * previous)
        previous = v
        for _ in range(corrections if following > 0 else 0):
            noise = torch.randn(x.shape, generator=generator).to(device)
            # E[noise | x] = x + (1 - t) v, and the score is -E[noise | x] / t.
            score = -(x + (1 - following) * velocity(x, torch.full((num,), following, device=device))) / following
            size = 2 * (0.1 * noise.norm(dim=1).mean() / score.norm(dim=1).mean()).square()
            x = x + size * score + (2 * size).sqrt() * noise
    return x.cpu()
