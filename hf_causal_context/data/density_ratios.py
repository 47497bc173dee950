"""Density ratios r_j(x) = p_j(x) / p_obs(x) of single interventions, in the form of mechanisms.

A classifier of contexts estimates them too, but takes the effects of a concept for the concept: where another
intervention has cut the dependence, which is where combinations lie, it is wrong. Here every concept j has two scalars
of one network, its value g_j(x) and what its causes predict h_j(x), and

    log r_j = log N(g_j; m_j, s_j^2) - log N(g_j; h_j, 1) + b_j,

the intervened mechanism over the observational one. Cross-entropy over all contexts at once, with the logits
0, log r_1 ... log r_K, finds them; two penalties say what holds where the contexts do not overlap:

- whiteness: mechanisms do not change, so that in every context the exogenous coordinates, g_j - h_j, or
  (g_j - m_j) / s_j under do(j), are independent and standard normal;
- normalization: r_i r_j p_obs is a density, that of the pair, so its mass over the pooled contexts is 1.

Shapes: B rows, C = K + 1 contexts (observational first), N rows of a context in a batch, K concepts, D features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import complete_or_absent, first_line
from .._random import seeded
from ..errors import UserValueError
from ..messages.progress import ProgressBar

NUM_MODELS = 2
NUM_FOLDS = 2
NUM_EPOCHS = 30
FEWEST_STEPS = 120  # small sets are learned by heart in more
# Rows of a context in a batch: moments need many, but so do small sets need steps.
SMALLEST_BATCH = 64
_BATCHES_PER_EPOCH = 40
WHITENESS_WEIGHT = 0.1
NORMALIZATION_WEIGHT = 0.1
NORMALIZATION_SLACK = 0.3  # of the log mass: heavy tails make a batch's own mass uncertain
LEARNING_RATE = 2e-3
SCALARS_RATE = 10.0  # of the Gaussians' parameters, which have far to go; relative
WEIGHT_DECAY = 0.1
EMA_DECAY = 0.995
STEPS_PER_SAVE = 100
_WIDTH = 256
_PREDICTED_AT_ONCE = 4096


def estimate_log_ratios(
    inputs: Tensor,
    codes: Tensor,
    num_concepts: int,
    *,
    seed: int,
    input_noise: float = 0.0,
    dropout: float = 0.0,
    device: torch.device | str = "cpu",
    keep_in: Path | None = None,
) -> Tensor:
    """Return log r_j at every row, (rows, K), float32: the log of the mean over models, none of which saw the row.

    Args:
        inputs: vectors (rows, D), float.
        codes: 0 for observational rows, j + 1 for those under an intervention on concept j; int64 (rows,).
        num_concepts: K.
        seed: of the folds, the networks and the batches.
        input_noise: deviation of noise on the inputs, in units of theirs: for many features and few rows.
        dropout: of the network, for the same.
        device: where the networks are trained.
        keep_in: a file for what is estimated so far. The same call goes on from there, or reads what it finished.
    """
    scaled = (inputs - inputs.mean(0)) / inputs.std().clamp(min=1e-6)
    folds = _folds(codes, num_concepts, seed)
    jobs = [(model, fold) for model in range(NUM_MODELS) for fold in range(NUM_FOLDS)]
    kept = KeptRatios(keep_in, _digest(scaled, codes, num_concepts, seed, input_noise, dropout))
    ratios = kept.ratios if kept.ratios is not None else torch.empty(NUM_MODELS, len(codes), num_concepts)
    total = sum(_size_and_steps(int((folds[model] != fold).sum()), num_concepts)[1] for model, fold in jobs)
    with ProgressBar(total=total, desc="estimate density ratios", unit="step") as bar:
        for number, (model, fold) in enumerate(jobs):
            training = folds[model] != fold
            with seeded(seed * len(jobs) + number, device):
                network = MechanismRatios(inputs.shape[1], num_concepts, dropout).to(device)
                fit = _Fit(network, scaled[training], codes[training], input_noise)
                if number < kept.finished:
                    bar.update(fit.num_steps)
                    continue
                if kept.fit is not None:
                    fit.load(kept.fit)
                    bar.update(fit.step)
                while fit.step < fit.num_steps:
                    fit.take_step()
                    bar.update()
                    if fit.step % STEPS_PER_SAVE == 0:
                        kept.save(ratios, number, fit.state())
            ratios[model, ~training] = _predict(fit.average.eval(), scaled[~training])
            kept.save(ratios, number + 1, None)
    return ratios.logsumexp(0) - math.log(NUM_MODELS)


class KeptRatios:
    """What is estimated so far, in a file, so that an interruption loses next to nothing.

    Args:
        path: of the file; None keeps nothing.
        made_from: what the ratios depend on; a file of others is not read, and overwritten.

    Attributes:
        ratios: those of the fits that are finished.
        finished: how many are.
        fit: the state of the next one, if it began.
    """

    def __init__(self, path: Path | None, made_from: str) -> None:
        self._path, self._made_from = path, made_from
        self.ratios: Tensor | None = None
        self.finished: int = 0
        self.fit: dict[str, Any] | None = None
        if path is not None and path.exists():
            try:
                stored = torch.load(path, weights_only=True)
            except Exception as error:  # torch, zip files and pickles raise whatever they like
                raise UserValueError(
                    f"{path} cannot be read ({first_line(error)}). Remove it: density ratios are then estimated anew."
                ) from error
            if stored["made_from"] == made_from:
                self.ratios, self.finished, self.fit = (stored[name] for name in ("ratios", "finished", "fit"))

    def save(self, ratios: Tensor, finished: int, fit: dict[str, Any] | None) -> None:
        """Replace the file.

        Raises:
            OSError: where it cannot be written.
        """
        self.fit = None  # was of one fit only
        if self._path is None:
            return
        stored = {"made_from": self._made_from, "ratios": ratios, "finished": finished, "fit": fit}
        with complete_or_absent(self._path) as unfinished:
            try:
                torch.save(stored, unfinished)
            except RuntimeError as error:  # torch's, of a full disk
                raise OSError(f"{self._path} cannot be written ({first_line(error)}). Make room.") from error


class MechanismRatios(nn.Module):
    """x (B, D) -> log ratios, values g and predictions h, (B, K) each."""

    def __init__(self, num_features: int, num_concepts: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(num_features, _WIDTH), nn.SiLU()),
            *(nn.Linear(_WIDTH, _WIDTH), nn.SiLU(), nn.Dropout(dropout)),
            *(nn.Linear(_WIDTH, _WIDTH), nn.SiLU()),
            nn.Linear(_WIDTH, 2 * num_concepts),
        )
        self.mean = nn.Parameter(torch.full((num_concepts,), 2.0))
        self.log_variance = nn.Parameter(torch.zeros(num_concepts))
        self.offset = nn.Parameter(torch.zeros(num_concepts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, predicted = self.body(x).chunk(2, dim=1)
        intervened = (value - self.mean).square() * (-self.log_variance).exp() + self.log_variance
        return 0.5 * (value - predicted).square() - 0.5 * intervened + self.offset, value, predicted

    def exogenous(self, value_CNK: Tensor, predicted_CNK: Tensor) -> Tensor:
        """Exogenous coordinates (C, N, K) of rows of every context, in the contexts' order."""
        intervened = (value_CNK - self.mean) * (-0.5 * self.log_variance).exp()
        own = torch.eye(value_CNK.shape[2], device=value_CNK.device).bool()
        own = torch.cat([torch.zeros_like(own[:1]), own])[:, None]
        return torch.where(own, intervened, value_CNK - predicted_CNK)


def whiteness_penalty(exogenous_CNK: Tensor) -> Tensor:
    """Scalar: how far each context's coordinates are from independent standard normal ones, by their moments.

    Squared errors of means, covariances, third and fourth moments, summed over coordinates, averaged over contexts.
    """
    mean = exogenous_CNK.mean(1, keepdim=True)
    centered = exogenous_CNK - mean
    covariance = centered.mT @ centered / centered.shape[1]
    identity = torch.eye(centered.shape[2], device=centered.device)
    errors = (
        mean.square().sum((1, 2))
        + (covariance - identity).square().sum((1, 2))
        + 0.1 * centered.pow(3).mean(1).square().sum(1)
        + 0.02 * (centered.pow(4).mean(1) - 3).square().sum(1)
    )
    return errors.mean()


def log_pool(log_ratios: Tensor, log_shares: Tensor) -> Tensor:
    """Return the log of the density of pooled rows over p_obs, (B,).

    Args:
        log_ratios: at the rows, (B, K).
        log_shares: of the observational set and the K single sets in the pool, (K + 1,).
    """
    return (_with_observational(log_ratios) + log_shares).logsumexp(1)


def _with_observational(log_ratios: Tensor) -> Tensor:
    """(B, K) -> (B, K + 1): the observational set's log ratio of 0 in front."""
    return nn.functional.pad(log_ratios, (1, 0))


class _Fit:
    """The training of one network, step by step; `average` is the moving average of its weights."""

    def __init__(self, model: MechanismRatios, inputs: Tensor, codes: Tensor, input_noise: float) -> None:
        self.model, self.average, self.step = model, copy.deepcopy(model).requires_grad_(False), 0
        self._inputs, self._input_noise = inputs, input_noise
        num_concepts = len(model.mean)
        rates = [LEARNING_RATE, SCALARS_RATE * LEARNING_RATE]
        groups = [
            {"params": list(model.body.parameters()), "weight_decay": WEIGHT_DECAY},
            {"params": [model.mean, model.log_variance, model.offset], "weight_decay": 0.0},
        ]
        self._batch, self.num_steps = _size_and_steps(len(inputs), num_concepts)
        self._optimizer = torch.optim.AdamW(groups, LEARNING_RATE)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, rates, self.num_steps, pct_start=0.05)
        self._sets = [torch.nonzero(codes == code)[:, 0] for code in range(num_concepts + 1)]

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self._optimizer,
            "schedule": self._schedule,
        }

    def state(self) -> dict[str, Any]:
        """Return all that the next steps depend on, the random state too."""
        device = self.model.mean.device
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return {"step": self.step, "random": states, **{name: part.state_dict() for name, part in self._parts.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.step = state["step"]
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.model.mean.device)

    def take_step(self) -> None:
        """Learn from a batch of every context."""
        model, device, num_concepts = self.model, self.model.mean.device, len(self.model.mean)
        num_contexts = num_concepts + 1
        labels = torch.arange(num_contexts, device=device).repeat_interleave(self._batch)
        log_shares = torch.full((num_contexts,), -math.log(num_contexts), device=device)
        pairs = torch.triu_indices(num_concepts, num_concepts, 1, device=device)
        shape = (num_contexts, self._batch, num_concepts)
        rows = torch.cat(
            [own[torch.randint(len(own), (self._batch,))] for own in self._sets]
        )  # contexts in their order
        x = self._inputs[rows].to(device)
        log_ratios, value, predicted = model(x + self._input_noise * torch.randn_like(x) if self._input_noise else x)
        logits = _with_observational(log_ratios)
        products = log_ratios[:, pairs[0]] + log_ratios[:, pairs[1]] - log_pool(log_ratios, log_shares)[:, None]
        log_masses = products.logsumexp(0) - math.log(len(products))
        penalty = WHITENESS_WEIGHT * whiteness_penalty(model.exogenous(value.view(shape), predicted.view(shape)))
        if len(log_masses):
            penalty += NORMALIZATION_WEIGHT * (log_masses.abs() - NORMALIZATION_SLACK).relu().square().mean()
        loss = nn.functional.cross_entropy(logits, labels) + penalty
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 1 - min(EMA_DECAY, self.step / (self.step + 9)))


def _folds(codes: Tensor, num_concepts: int, seed: int) -> Tensor:
    """Return the fold of every row for every model, (NUM_MODELS, rows): equal parts of each context."""
    folds = torch.empty(NUM_MODELS, len(codes), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for own in folds:
        for code in range(num_concepts + 1):
            rows = torch.nonzero(codes == code)[:, 0]
            own[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % NUM_FOLDS
    return folds


def _size_and_steps(num_rows: int, num_concepts: int) -> tuple[int, int]:
    """Return how many rows of a context a batch of a fit has, and how many batches."""
    rows_per_context = num_rows // (num_concepts + 1)
    size = max(SMALLEST_BATCH, rows_per_context // _BATCHES_PER_EPOCH)
    return size, max(FEWEST_STEPS, NUM_EPOCHS * rows_per_context // size)


def _digest(inputs: Tensor, codes: Tensor, *settings: float) -> str:
    """Return a hash of all that the ratios depend on."""
    digest = blake2b(repr((settings, NUM_MODELS, FEWEST_STEPS, SMALLEST_BATCH)).encode(), digest_size=16)
    for tensor in (inputs, codes):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _predict(model: MechanismRatios, inputs: Tensor) -> Tensor:
    return torch.cat([model(part.to(model.mean.device))[0].cpu() for part in inputs.split(_PREDICTED_AT_ONCE)])
