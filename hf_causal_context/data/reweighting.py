"""Rows that stand for combinations nobody intervened on: a held-out combination is a reweighting of data we have.

Under interventions on disjoint targets, without hidden confounding, the densities obey the truncated factorisation
p_ab p_obs = p_a p_b (Pearl), whatever the graph. With the density ratios r_j = p_j / p_obs of the single interventions,
rows of all contexts together follow the combination S when they are weighted by

    w_S(x) = prod_{j in S} r_j(x) / (share_obs + sum_k share_k r_k(x)),

the denominator being the density of the pooled rows over p_obs. It works where the supports overlap: the effective
sample size (ESS, Kish) says how many rows really carry a combination.

Shapes: N rows, K concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..contexts import ConceptSet, Context
from .density_ratios import estimate_log_ratios, log_pool

# A combination below it rests on too few rows to be learnt from them, and is left to the mechanism.
MIN_EFFECTIVE_SAMPLE_SIZE = 100
# Nor are ratios believed whose combination has another mass than 1 by a larger factor.
LARGEST_MASS_ERROR = 3.0
# No row makes up more than this share of a combination: a single wrong ratio must not fill it.
_LARGEST_SHARE = 0.003


@dataclass(frozen=True)
class ReweightedContext:
    """A combination drawn from rows of other contexts.

    Attributes:
        context: the combination.
        rows: numbers of the drawn rows, int64; some come several times. Empty where the ESS is too small.
        effective_sample_size: how many equally weighted rows the weights are worth.
        mass: of the combination's density over the pooled rows; far from 1, the estimated ratios contradict each other.
    """

    context: Context
    rows: Tensor
    effective_sample_size: float
    mass: float

    @property
    def supported(self) -> bool:
        """Whether the data holds this combination."""
        return len(self.rows) > 0


def reweight(
    inputs: Tensor,
    contexts: Sequence[str],
    concepts: ConceptSet,
    wanted: Sequence[Context],
    *,
    seed: int,
    input_noise: float = 0.0,
    dropout: float = 0.0,
    device: torch.device | str = "cpu",
) -> list[ReweightedContext]:
    """Draw rows that follow the combinations in `wanted`, as many as a context has on average.

    Args:
        inputs: vectors (N, D), float: the data, or features that tell what was intervened on.
        contexts: the context of every row; only observational rows and single concepts at strength 1 are used.
        concepts: all concepts.
        wanted: combinations, from `wanted_combinations`.
        seed: of the estimated densities and of the draw.
        input_noise, dropout: against overfitting, see `estimate_log_ratios`.
        device: where the densities are estimated.

    Raises:
        ValueError: for a missing set of the observational context or of a concept.
    """
    codes = _codes([Context.parse(context) for context in contexts], concepts)
    _check_sets(codes, concepts)
    used = torch.nonzero(codes >= 0)[:, 0]
    options: Any = {"seed": seed, "input_noise": input_noise, "dropout": dropout, "device": device}
    ratios = estimate_log_ratios(inputs[used], codes[used], len(concepts), **options)
    shares = torch.bincount(codes[used], minlength=len(concepts) + 1) / len(used)
    generator = torch.Generator().manual_seed(seed)
    num = len(used) // (len(concepts) + 1)
    drawn = []
    for context in wanted:
        logits = combination_logits(ratios, shares, [concepts.index(target) for target in context.targets])
        weights, mass = logits.softmax(0), float(logits.exp().mean())
        size = effective_sample_size(weights)
        believed = size >= MIN_EFFECTIVE_SAMPLE_SIZE and 1 / LARGEST_MASS_ERROR <= mass <= LARGEST_MASS_ERROR
        rows = used[draw(weights, num, generator)] if believed else used[:0]
        drawn.append(ReweightedContext(context, rows, size, mass))
    return drawn


def combination_logits(log_ratios: Tensor, shares: Tensor, targets: Sequence[int]) -> Tensor:
    """log w_S (N,), float64: the weights under which pooled rows follow a combination; their mean is its mass.

    Args:
        log_ratios: log p_j / p_obs at every row, (N, K).
        shares: of the observational set and the K single sets in the pool, (K + 1,).
        targets: numbers of the combination's concepts.
    """
    log_ratios = log_ratios.double()
    return log_ratios[:, list(targets)].sum(1) - log_pool(log_ratios, shares.log())


def effective_sample_size(weights: Tensor) -> float:
    """Kish's (sum w)^2 / sum w^2 of weights (N,)."""
    return float(weights.sum().square() / weights.square().sum())


def draw(weights: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Row numbers (num,) in proportion to weights (N,), the largest ones capped; each row floor or ceil of its share.

    Systematic resampling: less noise than independent draws.
    """
    cap = max(_LARGEST_SHARE, 4 / len(weights))
    for _ in range(50):  # what is cut off goes to the others in proportion, which may pass the cap in turn
        weights = (weights / weights.sum()).clamp(max=cap)
    order = torch.randperm(len(weights), generator=generator)
    edges = (weights[order] / weights.sum()).cumsum(0)
    points = (torch.arange(num) + torch.rand((), generator=generator)) / num
    return order[torch.searchsorted(edges, points.double()).clamp(max=len(weights) - 1)]


def wanted_combinations(names: Sequence[str], concepts: ConceptSet) -> list[Context]:
    """``["pairs"]``, ``["all"]`` or combinations by name -> contexts.

    Raises:
        ValueError: for unknown concepts, or a context that is no combination at strength 1.
    """
    if list(names) in (["pairs"], ["all"]):
        sizes = (2,) if names[0] == "pairs" else range(2, len(concepts) + 1)
        return [Context(*targets) for size in sizes for targets in combinations(concepts, size)]
    wanted = [Context.parse(name) for name in names]
    concepts.mask(wanted)  # refuses unknown names
    for context in wanted:
        if len(context.targets) < 2 or set(context.strengths.values()) != {1.0}:
            raise ValueError(
                f"{str(context) or 'The observational context'!r} cannot be reweighted: it is no combination of "
                "concepts at strength 1. Name such as 'thick+slant', or 'pairs', or 'all'."
            )
    return wanted


def _codes(contexts: Sequence[Context], concepts: ConceptSet) -> Tensor:
    """0 for observational rows, k + 1 for those of concept k alone at strength 1, -1 for others; int64 (N,)."""
    number = {Context(): 0, **{Context(name): k for k, name in enumerate(concepts, 1)}}
    return torch.tensor([number.get(context, -1) for context in contexts])


def _check_sets(codes: Tensor, concepts: ConceptSet) -> None:
    counts = torch.bincount(codes[codes >= 0], minlength=len(concepts) + 1).tolist()
    names = ("the observational set", *(f"the set of {name!r}" for name in concepts))
    if missing := [name for name, count in zip(names, counts, strict=True) if not count]:
        raise ValueError(
            f"Reweighting combinations needs the observational set and one set per concept at strength 1; missing: "
            f"{', '.join(missing)}. Add the rows, or leave --reweighted_contexts out."
        )
