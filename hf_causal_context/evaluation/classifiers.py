"""A small classifier that answers one question per concept: was this concept intervened on?

It is trained on real rows of all contexts there are, combinations that training held out too: it judges.

Shapes: N rows, K concepts, B rows per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._random import seeded
from ..contexts import ConceptSet, Context
from ..messages.progress import ProgressBar

RELIABLE_ACCURACY = 0.8

_BATCH_SIZE = 128
_MAX_STEPS = 1200
_MIN_STEPS = 200
_EPOCHS = 20
_LEARNING_RATE, _WEIGHT_DECAY = 2e-3, 0.01
# Of linear ones: texts have more features than a set has rows. Chosen on film reviews, for single concepts and pairs.
_LINEAR_LEARNING_RATE, _LINEAR_WEIGHT_DECAY = 1e-2, 1.0
_LINEAR_NORM = 10.0
_LINEAR_LEAST_SCALE = 0.05  # what hardly any row has must not decide
_ROWS_AT_ONCE = 1024


class ConceptClassifier(nn.Module):
    """Rows (N, ...) -> logits (N, K).

    A small CNN for images (N, C, H, W), an MLP for anything else, or logistic regression.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, rows: Tensor, num_concepts: int, linear: bool = False) -> None:
        super().__init__()
        images = rows.ndim == 4
        dims = (0, 2, 3) if images else 0
        scale = rows.std(dims, keepdim=True)
        if linear:
            scale = scale.clamp(min=_LINEAR_LEAST_SCALE) * rows.shape[1] ** 0.5 / _LINEAR_NORM
        self.register_buffer("center", rows.mean(dims, keepdim=True))
        self.register_buffer("scale", scale.clamp(min=1e-3))
        if linear:
            self.layers = nn.Linear(rows.shape[1], num_concepts)
            return
        if images:
            first = 2 * max(1, max(rows.shape[2:]) // 32)  # 16 pixels remain of 32 and of 64
            body = [
                *(nn.Conv2d(rows.shape[1], 16, first + 1, first, first // 2), nn.GELU()),
                *(nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GELU()),
                *(nn.AdaptiveAvgPool2d(4), nn.Flatten()),
            ]
            width = 64 * 16
        else:
            body, width = [nn.Flatten()], rows[0].numel()
        head = [nn.Linear(width, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.GELU()]
        self.layers = nn.Sequential(*body, *head, nn.Linear(128, num_concepts))

    def forward(self, rows: Tensor) -> Tensor:
        """Logits; positive where the concept is found."""
        return self.layers((rows - self.center) / self.scale)

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        """Logits (N, K) in batches, without gradients."""
        return torch.cat([self(part) for part in rows.split(_ROWS_AT_ONCE)])


def train_classifier(
    rows: Mapping[Context, Tensor], concepts: ConceptSet, seed: int = 0, linear: bool = False
) -> ConceptClassifier:
    """Train on rows (N, ...) of each context; it depends on these and the seed, and leaves the random state as it was.

    A concept is learned from contexts that differ in it alone, as much from those with it as from those without: do(a)
    beside the observational context, do(a, b) beside do(b). Learned from single concepts at once it would be "not b",
    and never be found in a combination.
    """
    values = torch.cat(list(rows.values()))
    answers, weights = _questions(tuple(rows), concepts)
    of_row = torch.cat([torch.full((len(part),), number) for number, part in enumerate(rows.values())])
    chances = torch.cat([torch.full((len(part),), 1 / len(part)) for part in rows.values()])
    steps = int(min(_MAX_STEPS, max(_MIN_STEPS, _EPOCHS * len(values) / _BATCH_SIZE)))
    with seeded(seed):
        classifier = ConceptClassifier(values, len(concepts), linear)
        optimizer = torch.optim.AdamW(
            classifier.parameters(), weight_decay=_LINEAR_WEIGHT_DECAY if linear else _WEIGHT_DECAY
        )
        rate = _LINEAR_LEARNING_RATE if linear else _LEARNING_RATE
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        for _ in ProgressBar(range(steps), desc="train a classifier", unit="step"):
            batch = torch.multinomial(chances, _BATCH_SIZE, replacement=True)
            context = of_row[batch]
            loss = F.binary_cross_entropy_with_logits(classifier(values[batch]), answers[context], weights[context])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def at_one(context: Context) -> bool:
    """Whether all targets of a context have strength 1."""
    return set(context.strengths.values()) <= {1.0}


def balanced_accuracy(logits: Mapping[Context, Tensor], concepts: ConceptSet) -> dict[str, float]:
    """Per concept, the mean of how often it is found where it was intervened on and not found elsewhere.

    `logits` (N, K) are those of rows that the classifier was not trained on; every context counts the same.
    """
    accuracy = {}
    for k, name in enumerate(concepts):
        found = {context: float((read[:, k] > 0).float().mean()) for context, read in logits.items()}
        present = [share for context, share in found.items() if name in context.targets]
        absent = [1 - share for context, share in found.items() if name not in context.targets]
        accuracy[name] = (sum(present) / len(present) + sum(absent) / len(absent)) / 2
    return accuracy


def _questions(contexts: Sequence[Context], concepts: ConceptSet) -> tuple[Tensor, Tensor]:
    """Answers (contexts, K), and how much each context counts for each concept."""
    answers, weights = torch.zeros(2, len(contexts), len(concepts))
    for i, context in enumerate(contexts):
        for k, name in enumerate(concepts):
            others = {other: strength for other, strength in context.strengths.items() if other != name}
            if name in context.targets and (without := Context(others)) in contexts:
                weights[i, k] += 1
                weights[contexts.index(without), k] += 1
            answers[i, k] = name in context.targets
    return answers, weights / weights.mean(0)
