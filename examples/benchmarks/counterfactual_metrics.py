"""How true edits are: the metrics of the counterfactual benchmark, from their definitions, beside the truth itself.

    composition   how far an image is from itself after edits that change nothing
    effectiveness errors of what the intervention moves: measured in the pixels, and predicted by a network
    minimality    error of what it does not move
    realism       kernel distance of features from those of real images of the context

Attributes are errors against the true counterfactual, in standard deviations of the images without intervention.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_causal_context import Context

from .counterfactual_study import Task, floats

PER_CONTEXT, EPOCHS = 500, 4  # of the predictor's training
SUBSETS = 8  # of the images, for the interval of the kernel distance

Values = NDArray[np.floating[Any]]


class Predictor(nn.Module):
    """Attributes in standard units and logits of the ten digits, of images (N, 1, 32, 32) in [0, 1]."""

    def __init__(self, attributes: int) -> None:
        super().__init__()
        sizes = (1, 16, 32, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.SiLU())
            for a, b in pairwise(sizes)
        )
        self.head = nn.Sequential(nn.Linear(64 * 16, 128), nn.SiLU())
        self.out = nn.Linear(128, attributes + 10)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Features of every block."""
        maps = [images]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    def features(self, images: Tensor) -> Tensor:
        """Features of the last hidden layer (N, 128)."""
        return self.head(self.maps(images)[-1].flatten(1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.out(self.features(images))
        return out[:, :-10], out[:, -10:]


class Judge:
    """A task's metrics; its predictor is trained once, on real images of every context.

    Attributes:
        center, unit: mean and standard deviation of the attributes without intervention.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task = task
        plain = task.measure(task.labelled(PER_CONTEXT, Context(), 50)[0])
        self.center, self.unit = np.nanmean(plain, axis=0), np.nanstd(plain, axis=0)
        self.predictor = Predictor(len(task.attributes))
        file = folder / "predictor.pt"
        if not file.exists():
            torch.manual_seed(0)
            self._train()
            torch.save(self.predictor.state_dict(), file)
        self.predictor.load_state_dict(torch.load(file))
        self.predictor.eval()

    def _train(self) -> None:
        sets = [self.task.labelled(PER_CONTEXT, c, 60 + i) for i, c in enumerate(self.task.world.contexts)]
        images, classes = (np.concatenate(part) for part in zip(*sets, strict=True))
        measured = (self.task.measure(images) - self.center) / self.unit
        seen = np.isfinite(measured).all(axis=1)
        inputs, targets = floats(images[seen]), torch.from_numpy(measured[seen]).float()
        labels = torch.from_numpy(classes[seen]).long()
        steps = EPOCHS * len(inputs) // 64
        optimizer = torch.optim.AdamW(self.predictor.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(inputs), (64,))
            attributes, logits = self.predictor(inputs[rows])
            loss = F.smooth_l1_loss(attributes, targets[rows]) + 0.3 * F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def composition(self, images: Tensor, made: Tensor) -> dict[str, Values]:
        """Distances (N,) of what edits without a change made of images: in pixels, and in features."""
        distance = torch.zeros(len(images))
        for a, b in zip(self.predictor.maps(images), self.predictor.maps(made), strict=True):
            distance += (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
        return {"L1": (images - made).abs().mean((1, 2, 3)).numpy(), "features": distance.numpy()}

    @torch.no_grad()
    def edits(self, context: Context, made: Tensor) -> dict[str, Values]:
        """Scores (N,) of edits (N, 1, 32, 32) to a context; the kernel distance (SUBSETS,)."""
        true = self.task.truth(context)
        moved = self.task.moved(context)
        measured = np.abs(self._measured(made) - self._measured(floats(true)))
        (predicted, logits), (expected, _) = self.predictor(made), self.predictor(floats(true))
        errors = (predicted - expected).abs().numpy()
        real = floats(self.task.world.reference(context, 2 * len(made)))
        return {
            "RMSE": (made - floats(true)).square().mean((1, 2, 3)).sqrt().numpy(),
            "moved, measured": measured[:, moved].mean(1),
            "moved, predicted": errors[:, moved].mean(1),
            "digit": (logits.argmax(1).numpy() == self.task.factual[1]).astype(float),
            "unmoved": measured[:, ~moved].mean(1),
            "KID": kernel_distances(self.predictor.features(made), self.predictor.features(real)),
        }

    def _measured(self, images: Tensor) -> Values:
        values = (self.task.measure((255 * images[:, 0]).round().byte().numpy()) - self.center) / self.unit
        return np.where(np.isfinite(values), values, 0.0)  # without ink: what is typical


def kernel_distances(features: Tensor, real: Tensor) -> Values:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3, of each subset of the features to all real ones."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def between(a: Tensor) -> Tensor:
        within = kernel(a, a)
        return (within.sum() - within.trace()) / (len(a) * (len(a) - 1))

    real_within = between(real)
    parts = features.chunk(SUBSETS)
    return np.array([float(between(part) + real_within - 2 * kernel(part, real).mean()) for part in parts])


def interval(values: Values, digits: int = 3) -> str:
    """Mean and half of its 95 % confidence interval."""
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean() + 0.0:.{digits}f} ± {half:.{digits}f}"
