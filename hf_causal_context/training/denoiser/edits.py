"""Training on pairs: the denoiser also learns at the states that its own edits of images pass through.

An edit (`counterfactual`) carries the noise of the image that it starts from, so on its way it holds details of that
image, which noised samples of a context do not. Strokes that would have to lie elsewhere are then held in place. Where
the data has the image in both contexts, it is known how every state should go on. With the states x_t of the image x_0,
and y_t of its edit towards the partner y_0, an edit arrives at the partner if at each level

    clean(y_t; to) - clean(x_t; from) = y_0 - x_0,

and this is what is learned. States are those of the model as it is, not those of perfect edits: Ross, Gordon and
Bagnell, "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning" (AISTATS 2011).

Shapes: q pairs, S steps of an edit, n states that are learned at, C channels, H x W (latent) pixels, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from ...bases.diffusion_base import DiffusionBase
from ...data import InterventionalData
from ...data.pairs import partners
from ...data.sampling import shares_of
from ...inference.sampling_steps import Step, clean_of, sampling_steps, times_for
from ..arguments import TrainingArguments
from ..loop.objective import Objective
from ..noise import EDIT, chance_of, generator_of

NUM_STEPS = 12  # of an edit
STATES = 4  # of each edit that are learned at
ROWS_PER_PAIR = 8  # of a run: so half as many states as samples
BEGIN = 0.3  # of the run, after which there is something to edit by
MOST_WEIGHT = 6.0  # of a squared error of the clean image, which velocities weigh by 1 / sigma^2


@dataclass
class Edits:
    """Pairs to edit, on the model's device.

    `factual` and `partner` (q, C, H, W): what the denoiser models, without intervention and in `context` (q, K), a
    mask. `conditions`: row-wise tensors of captions or classes. `slots`: positions in the run that noise belongs to.
    """

    factual: Tensor
    partner: Tensor
    context: Tensor
    conditions: dict[str, Tensor]
    seed: int
    slots: list[int]


def not_edited(base: DiffusionBase, data: InterventionalData, arguments: TrainingArguments) -> str:
    """Say why a training does not look at the pairs of the data; empty where it does."""
    reasons = {
        "bases of videos are not edited": base.is_video,
        "nobody knows what edits should do where masks leave images out": data.has_masks,
        "in buckets, both images of a pair may have different sizes": arguments.aspect_ratio_buckets,
        "text encoders would have to be trained along edits, too": arguments.train_text_encoder,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    return f"The pairs are for evaluate alone, and the training does not look at them: {reason}." if reason else ""


class Pairs:
    """Which rows of the data are pairs, and which of them a batch edits.

    Args:
        data: what is trained on.
        arguments: the run's settings.
        first_batch: the number of the first batch that edits some.
        weights: of contexts in batches, where they are not 1.
    """

    def __init__(
        self, data: InterventionalData, arguments: TrainingArguments, first_batch: int, weights: Mapping[str, float]
    ) -> None:
        assert isinstance(data.rows, Dataset)
        rows = data.rows.with_format(None)
        contexts = rows["context"][:]
        self._partners = partners(contexts, rows["pair"][:])
        self._seed, self._first_batch = arguments.seed, first_batch
        named = np.array(contexts)
        self._numbers = {
            name: numbers
            for name in data.contexts
            if weights.get(name, 1) and len(numbers := np.flatnonzero((named == name) & (self._partners >= 0)))
        }
        own = {name: weights[name] for name in self._numbers if name in weights}
        self._shares = shares_of(list(self._numbers), own) if self._numbers else np.zeros(0)

    def told(self, begin: float) -> str:
        """Say how many pairs are edited, and after which share of the steps."""
        if not self._numbers:
            return (
                "The pairs are for evaluate alone, and the training does not look at them: none is in a context that "
                "is trained on."
            )
        return (
            f"After {begin:.0%} of the steps, batches also edit some of the {sum(map(len, self._numbers.values())):,} "
            "pairs, and learn what leads edits to the partners. Steps then take about three times as long on average."
        )

    def chosen(self, batch: int, slots: range) -> tuple[list[int], list[int], list[int]]:
        """Return slots, rows of interventions and rows of their partners, of the pairs of a batch.

        Contexts have the shares that they have among samples. All processes edit as many in their batch of a number.
        """
        # Of small batches one in a few has a pair, the very first among them: a dry run counts what that one takes.
        done = max(0, batch - self._first_batch) * len(slots)
        count = -done // ROWS_PER_PAIR - -(done + len(slots)) // ROWS_PER_PAIR
        slots, rows = slots[: count if self._begun(batch) else 0], []
        for slot in slots:
            generator = chance_of(self._seed, slot, EDIT)
            numbers = list(self._numbers.values())[generator.choice(len(self._numbers), p=self._shares)]
            rows.append(int(numbers[generator.integers(len(numbers))]))
        return [*slots], rows, self._partners[rows].tolist()

    def weight(self, batch: int, rows: int, edited: int) -> float:
        """Return what the mean loss of a batch counts, so that samples and states count alike in batches of any size.

        Args:
            batch: its number.
            rows: its samples.
            edited: its pairs.
        """
        if not self._begun(batch):
            return 1.0
        return (rows + STATES * edited) / (rows * (1 + STATES / ROWS_PER_PAIR))

    def _begun(self, batch: int) -> bool:
        return batch >= self._first_batch and bool(self._numbers)


class EditObjective:
    """A base's objective, and after the losses of the samples those of states of edits, where a batch has some."""

    def __init__(self, base: DiffusionBase, objective: Objective) -> None:
        self.base, self.objective = base, objective

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        """Losses (B,) of the samples, then (n,) of states."""
        losses = self.objective(model, batch)
        edits: Edits | None = getattr(batch, "edits", None)
        return losses if edits is None else torch.cat([losses, self.losses(model, edits)])

    def losses(self, model: nn.Module, edits: Edits) -> Tensor:
        """Losses (n,) of some states of each edit."""
        steps = sampling_steps(self.base, NUM_STEPS, edits.factual)
        generators = [generator_of(edits.seed, slot, EDIT) for slot in edits.slots]
        shape = (len(steps), *edits.factual.shape[1:])
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators], dim=1)
        states, targets = self._edit(model, edits, steps, noise.to(edits.factual))
        order = torch.stack([torch.randperm(len(steps), generator=generator)[:STATES] for generator in generators])
        step, pair = order.flatten(), torch.arange(len(order)).repeat_interleave(order.shape[1])
        each = pair.to(edits.factual.device)
        noisy = states[step.to(states.device), each]
        levels = torch.tensor([(s.time, s.alpha, s.sigma) for s in steps], device=noisy.device)[step].unbind(1)
        times, (alpha, sigma) = (
            times_for(self.base.prediction, levels[0]),
            (v.view(-1, *(1,) * (noisy.ndim - 1)) for v in levels[1:]),
        )
        conditions = {name: values[each] for name, values in edits.conditions.items()}
        output = self.base.predict(model, noisy, times, conditions, edits.context[each]).float()
        clean = clean_of(self.base.prediction, noisy.float(), output, alpha, sigma)
        errors = (clean - targets[step.to(targets.device), each]).square().flatten(1).mean(1)
        return errors * sigma.flatten().pow(-2).clamp(max=MOST_WEIGHT)

    @torch.no_grad()
    def _edit(self, model: nn.Module, edits: Edits, steps: list[Step], noise: Tensor) -> tuple[Tensor, Tensor]:
        """States of edits, and what should be taken for their clean images there, (S, q, C, H, W) each."""
        factual, nothing = edits.factual, torch.zeros_like(edits.context)
        path = [s.alpha * factual + s.sigma * n for s, n in zip(steps, noise, strict=True)] + [factual]
        contexts = torch.cat([nothing, edits.context])
        conditions = {name: torch.cat([values, values]) for name, values in edits.conditions.items()}
        y, states, targets = path[0], [], []
        for number, step in enumerate(steps):
            times = times_for(self.base.prediction, torch.full((len(y),), step.time, device=y.device))
            both = torch.cat([path[number], y])
            output = self.base.predict(model, both, times.repeat(2), conditions, contexts).float()
            x_clean, y_clean = clean_of(self.base.prediction, both.float(), output, step.alpha, step.sigma).chunk(2)
            states.append(y)
            targets.append(edits.partner.float() + x_clean - factual.float())
            y = (path[number + 1] + step.mean(y, y_clean) - step.mean(path[number], x_clean)).to(factual)
        return torch.stack(states), torch.stack(targets)
