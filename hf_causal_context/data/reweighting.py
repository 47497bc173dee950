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

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..contexts import ConceptSet, Context
from ..errors import UserValueError
from ..messages.wording import quoted
from .density_ratios import NUM_FOLDS, estimate_log_ratios, log_pool

# A combination below it rests on too few rows to be learned from them, and is left to the mechanism.
MIN_EFFECTIVE_SAMPLE_SIZE = 50
# Nor are ratios believed whose combination has another mass than 1 by a larger factor.
LARGEST_MASS_ERROR = 3.0
# Nor where drawn rows are not the combination: they must look intervened on in all of its concepts at once at least
# this often, relative to rows that were. Each concept by itself is no test, which rows with one or the other pass.
_LEAST_PRESENCE = 0.5
# Where fewer observational rows than this share look intervened on, sets lie apart, and more rows of the same kind
# hardly help. (Rows of other concepts' sets would say it too, but there the estimates extrapolate.)
_LEAST_OVERLAP = 0.05
# Nor where nothing was learned: rows under an intervention must look so this much more often than observational ones.
_LEAST_CONTRAST = 0.1
# No row makes up more than this share of a combination: a single wrong ratio must not fill it.
_LARGEST_SHARE = 0.003
# Where this cap moves no more of the weight than this, the other rows carry the combination, and are what counts: in
# heavy tails, one row of enormous weight would make the effective sample size that of next to nothing.
_MOST_MOVED = 0.2


@dataclass(frozen=True)
class Doubt:
    """Why the data does not support a combination.

    Attributes:
        kind: "alike" if a set cannot be told from the observational one; "apart" if no rows show the combination,
            however many there are; "few" if too few do; "contradictory" if the densities cannot all be true.
        reason: the same in words.
        concepts: those that it is about.
    """

    kind: Literal["alike", "apart", "few", "contradictory"]
    reason: str
    concepts: tuple[str, ...]


@dataclass(frozen=True)
class ReweightedContext:
    """A combination drawn from rows of other contexts.

    Attributes:
        context: the combination.
        rows: numbers of the drawn rows, int64; some come several times. Empty if there is a doubt.
        effective_sample_size: how many equally weighted rows the weights are worth; a few enormous ones do not count.
        mass: of the combination's density over the pooled rows; far from 1, the estimated ratios contradict each other.
        doubt: why the data does not support the combination, or None.
    """

    context: Context
    rows: Tensor
    effective_sample_size: float
    mass: float
    doubt: Doubt | None


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
    keep_in: Path | None = None,
) -> list[ReweightedContext]:
    """Draw rows that follow the combinations in `wanted`, as many as a context has on average.

    Args:
        inputs: vectors (N, D), float: the data, or features that tell what was intervened on.
        contexts: the context of every row; only observational rows and single concepts at strength 1 are used.
        concepts: all concepts.
        wanted: combinations, from `wanted_combinations`.
        seed: of the estimated densities and of the draw.
        input_noise: against overfitting, see `estimate_log_ratios`.
        dropout: against overfitting, too.
        device: where the densities are estimated.
        keep_in: a file for what is estimated so far, see `estimate_log_ratios`.

    Raises:
        ValueError: for a missing set of the observational context or of a concept.
    """
    codes = check_sets(contexts, concepts)
    used = torch.nonzero(codes >= 0)[:, 0]
    codes = codes[used]
    ratios = estimate_log_ratios(
        inputs[used],
        codes,
        len(concepts),
        seed=seed,
        input_noise=input_noise,
        dropout=dropout,
        device=device,
        keep_in=keep_in,
    )
    drawn = draw_combinations(ratios, codes, concepts, wanted, seed=seed)
    return [replace(combination, rows=used[combination.rows]) for combination in drawn]


def draw_combinations(
    ratios: Tensor, codes: Tensor, concepts: ConceptSet, wanted: Sequence[Context], *, seed: int
) -> list[ReweightedContext]:
    """Draw rows by their log ratios: what `reweight` does when it has estimated them.

    Args:
        ratios: log r_j at every row, (N, K).
        codes: 0 for observational rows, j + 1 for those under an intervention on concept j; int64 (N,).
        concepts: all concepts.
        wanted: combinations.
        seed: of the draw.
    """
    found = ratios > 0  # rows that look intervened on
    shares = torch.bincount(codes, minlength=len(concepts) + 1) / len(codes)
    generator = torch.Generator().manual_seed(seed)
    num = len(codes) // (len(concepts) + 1)
    drawn = []
    for context in wanted:
        targets = [concepts.index(target) for target in context.targets]
        logits = combination_logits(ratios, shares, targets)
        weights, mass = logits.softmax(0), float(logits.exp().mean())
        capped = cap(weights)  # what is drawn by; in small sets it may spread to rows that lack a concept
        moved = float((weights - capped).clamp(min=0).sum())
        size = effective_sample_size(capped if moved <= _MOST_MOVED else weights)
        doubt = _doubt(found, codes, capped, size, mass, targets, concepts)
        rows = codes[:0] if doubt else draw(capped, num, generator)
        drawn.append(ReweightedContext(context, rows, size, mass, doubt))
    return drawn


def _doubt(
    found: Tensor,
    codes: Tensor,
    weights: Tensor,
    size: float,
    mass: float,
    targets: Sequence[int],
    concepts: ConceptSet,
) -> Doubt | None:
    """Return what speaks against a combination, if anything; `weights` are those that rows are drawn by."""
    names = tuple(concepts.names[k] for k in targets)
    looks = torch.stack([found[codes == code].double().mean(0) for code in range(len(concepts) + 1)])
    intervened = torch.stack([looks[k + 1, k] for k in targets])
    observational = looks[0, list(targets)]
    if alike := tuple(n for n, x in zip(names, intervened - observational, strict=True) if x < _LEAST_CONTRAST):
        return Doubt("alike", f"{quoted(alike)} cannot be told from the observational rows", alike)
    all_of_it = found[:, list(targets)].all(1)
    presence = float(weights @ all_of_it.double())
    wrong_mass = not 1 / LARGEST_MASS_ERROR <= mass <= LARGEST_MASS_ERROR
    if size >= MIN_EFFECTIVE_SAMPLE_SIZE and presence >= _LEAST_PRESENCE * float(intervened.prod()) and not wrong_mass:
        return None
    # A row shows the combination if one of its concepts was intervened on, and the others come by themselves.
    if float(observational.sort().values[1]) < _LEAST_OVERLAP:
        shares = weights @ found[:, list(targets)].double() / intervened
        return Doubt("apart", f"no rows look like all of it: most lack {names[int(shares.argmin())]!r}", names)
    if size < MIN_EFFECTIVE_SAMPLE_SIZE:
        return Doubt("few", f"fewer than {MIN_EFFECTIVE_SAMPLE_SIZE}", names)
    if wrong_mass:
        reason = f"its mass is {mass:.2g} instead of 1: the estimated densities contradict each other"
        return Doubt("contradictory", reason, names)
    return Doubt("few", f"only {presence:.0%} of the rows look like all of it", names)


def combination_logits(log_ratios: Tensor, shares: Tensor, targets: Sequence[int]) -> Tensor:
    """Return log w_S (N,), float64: the weights under which pooled rows follow a combination; their mean is its mass.

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


def cap(weights: Tensor) -> Tensor:
    """Weights (N,), summing to 1, of which no row has more than its largest share."""
    largest = max(_LARGEST_SHARE, 4 / len(weights))
    for _ in range(50):  # what is cut off goes to the others in proportion, which may pass the cap in turn
        weights = (weights / weights.sum()).clamp(max=largest)
    return weights / weights.sum()


def draw(weights: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Row numbers (num,) in proportion to weights (N,); each row floor or ceil of its share.

    Systematic resampling: less noise than independent draws.
    """
    order = torch.randperm(len(weights), generator=generator)
    edges = (weights[order] / weights.sum()).cumsum(0)
    points = (torch.arange(num) + torch.rand((), generator=generator)) / num
    return order[torch.searchsorted(edges, points.double()).clamp(max=len(weights) - 1)]


def wanted_combinations(names: Sequence[str], concepts: ConceptSet) -> list[Context]:
    """``["pairs"]``, ``["all"]`` or combinations by name -> contexts.

    Raises:
        ValueError: for unknown concepts, a context that is no combination at strength 1, or a single concept, which
            has none.
    """
    if list(names) in (["pairs"], ["all"]):
        if len(concepts) < 2:
            raise UserValueError(
                f"{names[0]!r} are combinations of concepts, and there is only one, {quoted(concepts)}. Leave them "
                "out, or add the set of another concept."
            )
        sizes = (2,) if names[0] == "pairs" else range(2, len(concepts) + 1)
        return [Context(*targets) for size in sizes for targets in combinations(concepts, size)]
    if shorthand := {"pairs", "all"}.intersection(names):
        raise UserValueError(
            f"{sorted(shorthand)[0]!r} stands alone; received {list(names)}. Name it, or combinations."
        )
    concepts.check_words(names, ("pairs", "all"))
    wanted = [Context.parse(name) for name in names]
    concepts.mask(wanted)  # refuses unknown names
    for context in wanted:
        if len(context.targets) < 2 or set(context.strengths.values()) != {1.0}:
            raise UserValueError(
                f"{str(context) or 'The observational context'!r} is no combination of concepts at strength 1."
                " Name such as 'thick+slant', or 'pairs', or 'all'."
            )
    return wanted


def without_rows(
    wanted: Sequence[Context], present: Container[str], done: str, tell: Callable[[str], object]
) -> list[Context]:
    """Return the combinations that have no rows, and tell which have some: those need none that are made up.

    Args:
        wanted: combinations.
        present: names of the contexts that have rows.
        done: what is not done with those, such as "reweighted".
        tell: takes a message.
    """
    left = [context for context in wanted if str(context) not in present]
    if not left:
        tell(f"No combination is left to be {done}: all that were named have training rows.")
    elif having := [str(context) for context in wanted if context not in left]:
        tell(f"Not {done}, since they have training rows: {quoted(having)}.")
    return left


def check_sets(contexts: Sequence[str], concepts: ConceptSet, option: str = "--reweighted_contexts") -> Tensor:
    """0 for observational rows, k + 1 for those of concept k alone at strength 1, -1 for others; int64 (N,).

    Raises:
        ValueError: for a set without enough rows.
    """
    number = {"": 0, **{str(Context(name)): k for k, name in enumerate(concepts, 1)}}
    codes = torch.tensor([number.get(context, -1) for context in contexts])
    counts = torch.bincount(codes[codes >= 0], minlength=len(concepts) + 1).tolist()
    names = ("the observational set", *(f"the set of {name!r}" for name in concepts))
    if few := [f"{name} has {count}" for name, count in zip(names, counts, strict=True) if count < NUM_FOLDS]:
        raise UserValueError(
            f"{option} needs the observational set and one set per concept at strength 1, each of at least {NUM_FOLDS} "
            f"training rows: {', '.join(few)}. Add rows, or leave {option} out."
        )
    return codes
