"""All measures of one context.

Shapes: N rows, K concepts, A attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contexts import Context
from .comparison import compare, compare_features
from .evidence import MIN_REAL_ROWS, EvaluationInputs
from .metrics import Estimate, beyond_base, mean_pairwise_distance
from .readings import Measurements
from .results import ContextResult, Distances

_PAIRED_ROWS = 500  # enough for a mean over all their pairs


@dataclass(frozen=True)
class Logits:
    """What the classifier says (N, K): of samples and of the base per seed group, and of judged real rows."""

    samples: Mapping[Context, Sequence[Tensor]]
    base: Sequence[Tensor]
    real: Mapping[Context, Tensor]


def context_result(evidence: EvaluationInputs, context: Context, logits: Logits, seed: int) -> ContextResult:
    """Measure a context."""
    groups, real = evidence.samples[context], evidence.usable().get(context)
    asked = len(groups[0])
    num = min(asked, len(real) // 2) if real is not None and not evidence.holds_texts else 0
    requested = [evidence.concepts.index(name) for name in context.targets]
    real_found = logits.real[context] > 0 if context in logits.real else None
    found = torch.cat(list(logits.samples[context])) > 0

    def conforming(*read: Tensor) -> float:
        return _share((torch.cat(read) > 0)[:, requested].all(1))

    conformity = Estimate.of([conforming(group) for group in logits.samples[context]])
    real_conformity = conforming(logits.real[context]) if requested and context in logits.real else None
    base_conformity = conforming(*logits.base) if requested else None
    beyond = [
        None if share is None or base_conformity is None else beyond_base(share, base_conformity)
        for share in (conformity.mean, real_conformity)
    ]
    attributes = torch.cat(_attributes(groups)).nanmean(0) if evidence.attribute_names else None
    real_attributes = real.attributes.nanmean(0) if real is not None and real.attributes is not None else None
    frechet, kernel = _feature_distances(evidence, groups, real, seed)
    names = evidence.concepts.names
    return ContextResult(
        context=str(context),
        trained=context in evidence.trained,
        num_real=len(evidence.real[context]) if context in evidence.real else 0,
        num_samples=sum(len(group) for group in groups),
        num_compared=num,
        distance=_distance(evidence, groups, real, num, seed),
        attribute_distance=_attribute_distance(evidence, groups, real, num, seed),
        frechet=frechet,
        kernel=kernel,
        conformity=conformity if requested else None,
        real_conformity=real_conformity,
        base_conformity=base_conformity,
        empty_conformity=conforming(*logits.samples[Context()]) if requested else None,
        conformity_beyond_base=beyond[0],
        real_conformity_beyond_base=beyond[1],
        presence=named(names, found.float().mean(0)),
        real_presence=None if real_found is None else named(names, real_found.float().mean(0)),
        attributes=None if attributes is None else named(evidence.attribute_names, attributes),
        real_attributes=None if real_attributes is None else named(evidence.attribute_names, real_attributes),
        diversity=None if real is None else _diversity(groups, real),
        notes=tuple(_notes(evidence, context, num)),
        perplexity=None if evidence.perplexities is None else evidence.perplexities.get(context),
    )


def _distance(
    evidence: EvaluationInputs, groups: Sequence[Measurements], real: Measurements | None, num: int, seed: int
) -> Distances | None:
    if real is None or evidence.holds_texts:
        return None
    own, base, empty = (_values(parts) for parts in (groups, evidence.base, evidence.samples[Context()]))
    return compare(own, base, real.values, num, seed, empty)


def _attribute_distance(
    evidence: EvaluationInputs, groups: Sequence[Measurements], real: Measurements | None, num: int, seed: int
) -> Distances | None:
    if real is None or not evidence.attribute_names:
        return None

    def complete(parts: Sequence[Measurements]) -> list[Tensor]:
        read = [evidence.standardized(part) for part in _attributes(parts)]
        return [part[~part.isnan().any(1)] for part in read]

    samples, base, (truth,) = complete(groups), complete(evidence.base), complete([real])
    num = min(num, len(truth) // 2, *map(len, samples), *map(len, base))
    return compare(samples, base, truth, num, seed) if num else None


def _feature_distances(
    evidence: EvaluationInputs, groups: Sequence[Measurements], real: Measurements | None, seed: int
) -> tuple[Distances, Distances] | tuple[None, None]:
    if real is None or real.features is None:
        return None, None
    samples, base = (
        torch.cat([part.features for part in parts if part.features is not None]) for parts in (groups, evidence.base)
    )
    return compare_features(samples, base, real.features, seed)


def _diversity(groups: Sequence[Measurements], real: Measurements) -> float | None:
    truth = mean_pairwise_distance(real.values[:_PAIRED_ROWS])
    if len(groups[0]) < 2 or truth == 0:
        return None
    own = [mean_pairwise_distance(group.values[:_PAIRED_ROWS]) for group in groups]
    return sum(own) / len(own) / truth


def _notes(evidence: EvaluationInputs, context: Context, num: int) -> Iterable[str]:
    groups, real = evidence.samples[context], evidence.real.get(context)
    name, asked = str(context) or "(observational)", len(groups[0])
    if real is None:
        yield f"{name}: no real rows, so nothing to compare with; judged by the classifiers alone."
    elif len(real) < MIN_REAL_ROWS:
        yield (
            f"{name}: {len(real)} real rows, of which at least {MIN_REAL_ROWS} are needed to compare; judged by the "
            "classifiers alone."
        )
    elif num < asked and not evidence.holds_texts:
        yield (
            f"{name}: {len(real)} real rows were read, less than twice the {asked} samples of a seed group: distances "
            f"compare {num} of the samples with {len(real) - num} real rows."
        )
    if evidence.attribute_names:
        unread = torch.cat(_attributes(groups)).isnan().any(1).float().mean()
        if unread > 0:
            yield f"{name}: {unread:.1%} of the samples have no readable attributes and are left out of these."


def _values(parts: Sequence[Measurements]) -> list[Tensor]:
    return [part.values for part in parts]


def _attributes(parts: Sequence[Measurements]) -> list[Tensor]:
    return [part.attributes for part in parts if part.attributes is not None]


def _share(found: Tensor) -> float:
    return float(found.float().mean())


def named(names: Sequence[str], values: Tensor) -> dict[str, float]:
    """Name -> value."""
    return dict(zip(names, values.tolist(), strict=True))
