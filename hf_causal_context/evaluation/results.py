"""What an evaluation found: plain dataclasses that JSON can hold.

Distances compare like with like: `floor` is the distance of as many real rows as there are samples in a seed group from
the other real rows, which are the reference of `samples` and `base` as well. The base is always the base without any
adapter; the empty context is the adapter's observational one, which need not be the base.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .metrics import Estimate


@dataclass(frozen=True)
class Distances:
    """Distances from the real rows of a context: of its samples, of real rows, of the base's samples.

    `gap_closed` is (base - samples) / (base - floor): 1 at the floor, 0 where the base is; None where the base is at
    the floor already. `empty` is the distance of the empty context's samples from the same real rows, where it was
    measured.
    """

    samples: Estimate
    floor: Estimate
    base: Estimate
    gap_closed: float | None
    empty: Estimate | None = None


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of real texts: in their context, in the empty one, and under the base; lower is likelier.

    `num_rows` texts were scored. Those of contexts that were trained on are what the adapter has learned from.
    """

    adapter: float
    empty: float
    base: float
    num_rows: int


@dataclass(frozen=True)
class ContextResult:
    """One context. What needs real rows is None without them; `notes` say why, and what was not as asked.

    Attributes:
        context: its printed form; "" is the observational one.
        trained: whether it was trained on.
        num_real, num_samples: rows and samples of all seed groups.
        num_compared: samples of a group, and real rows of the floor, in distances.
        distance: sliced Wasserstein distances of images or vectors; None for texts.
        attribute_distance: the same of attributes, in standard deviations of the observational real rows.
        frechet, kernel: FID and KID of the features.
        conformity: share of samples in which the classifiers find every requested concept; None for "".
        real_conformity: the same in real rows that the classifiers were not trained on.
        base_conformity, empty_conformity: the same in samples of the base, and of the empty context.
        conformity_beyond_base, real_conformity_beyond_base: see `beyond_base`.
        presence, real_presence: share in which a concept is found.
        attributes, real_attributes: means.
        diversity: mean distance between two samples over that between two real rows.
        notes: sentences.
        perplexity: of texts.
    """

    context: str
    trained: bool
    num_real: int
    num_samples: int
    num_compared: int
    distance: Distances | None
    attribute_distance: Distances | None
    frechet: Distances | None
    kernel: Distances | None
    conformity: Estimate | None
    real_conformity: float | None
    base_conformity: float | None
    empty_conformity: float | None
    conformity_beyond_base: float | None
    real_conformity_beyond_base: float | None
    presence: dict[str, float]
    real_presence: dict[str, float] | None
    attributes: dict[str, float] | None
    real_attributes: dict[str, float] | None
    diversity: float | None
    notes: tuple[str, ...]
    perplexity: Perplexity | None = None


@dataclass(frozen=True)
class Summary:
    """Means over contexts; `gap_closed` and what goes beyond the base are those of the means."""

    contexts: tuple[str, ...]
    samples: float | None
    floor: float | None
    base: float | None
    gap_closed: float | None
    conformity: float
    real_conformity: float | None
    base_conformity: float
    conformity_beyond_base: float | None
    real_conformity_beyond_base: float | None


@dataclass(frozen=True)
class Leakage:
    """What do(row) does to the reading of a column, beside the empty context: in samples and in real rows.

    `difference` is samples - data. The excess of a cell off the diagonal is how far the samples go beyond the data:
    |samples| - |data| in one direction, and all of |samples| where they go the other way than the data. The worst leak
    has the largest excess (None if there is nothing off the diagonal).
    """

    reading: str
    causes: tuple[str, ...]
    effects: tuple[str, ...]
    samples: list[list[float]]
    data: list[list[float]]
    difference: list[list[float]]
    worst_cause: str | None
    worst_effect: str | None
    worst_excess: float | None


@dataclass(frozen=True)
class Response:
    """How far each strength moves what is made, in units of the step from the empty context to strength 1.

    Attributes:
        reading: what is read, in words; see `response.py`.
        samples: of the adapter, at the strengths of the curve.
        truth: the same of real rows at these strengths, in units of their own step; None where there are none.
        falls: strengths above 0 at which it is below that of the strength before by more than chance does.
        num_samples: at each strength.
        num_real: real rows of the observational context, or of the concept at strength 1 if these are fewer.
    """

    reading: str
    samples: tuple[float, ...]
    truth: tuple[float | None, ...]
    falls: tuple[float, ...]
    num_samples: int
    num_real: int


@dataclass(frozen=True)
class StrengthCurve:
    """Mean readings of one concept at increasing strengths, from the same seeds; of texts from the same prompts.

    `monotone` says whether logits never fall between strengths 0 and 1 (of texts: by more than chance does),
    `attribute_monotone` whether the attribute of that name only rises or only falls. `zero_is_empty`: strength 0 gives
    the samples of the empty context, bit for bit; `zero_is_base`: those of the base. `response` is None where 0
    or 1 is missing, or the step between them cannot be told from chance.
    """

    concept: str
    strengths: tuple[float, ...]
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    monotone: bool
    attribute: tuple[float, ...] | None
    attribute_monotone: bool | None
    zero_is_base: bool
    zero_is_empty: bool
    response: Response | None = None


@dataclass(frozen=True)
class Drift:
    """How far the empty context is from the base at equal seeds: per pixel (or entry), and as a distance of sets."""

    largest: float
    mean: float
    distance: float


@dataclass(frozen=True)
class ToldApart:
    """How well a classifier tells texts from observational real ones, as a balanced accuracy; 0.5 is guessing.

    `base`: texts of the base, `empty`: of the empty context.
    """

    base: float
    empty: float


@dataclass(frozen=True)
class EditResult:
    """How far edits of observational images to a context are from their true partners there; over images.

    Attributes:
        context: its printed form.
        trained: whether it was trained on.
        num_pairs: how many were edited.
        error, unedited: root mean square difference from the partner, in [0, 1] units, of the edit and of no edit.
        gain: unedited - error, of each image.
        feature_error, unedited_feature_error: cosine distances of features; None without a feature extractor.
    """

    context: str
    trained: bool
    num_pairs: int
    error: Estimate
    unedited: Estimate
    gain: Estimate
    feature_error: Estimate | None
    unedited_feature_error: Estimate | None


@dataclass(frozen=True)
class Verdict:
    """What it all comes to; see `verdict.py`. `works`: everything asked for was judged, and nothing was found wrong."""

    works: bool
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationReport:
    """All that was measured.

    Attributes:
        concepts: the adapter's.
        verdict: the report in a few sentences.
        notes: what a reader must know first, as sentences.
        contexts: one result each; the observational context first, then single concepts, then combinations.
        trained, unseen: means over the contexts with a target that were and were not trained on; None without any.
        classifier_accuracy: balanced accuracy per concept on real rows that the classifier was not trained on.
        base_presence: share of the base's samples in which each concept is found.
        leakage, attribute_leakage: of the classifiers' probabilities, and of attributes in standard deviations.
        strength_curves: one per concept.
        drift: of the empty context; None for texts.
        told_apart: of texts.
        edits: of images that have a partner, one for each context; empty for data without pairs.
        settings: how the samples were made.
        examples: images per context, real ones (or None) and samples; not part of the JSON.
        texts: the same for texts.
    """

    concepts: tuple[str, ...]
    verdict: Verdict
    notes: tuple[str, ...]
    contexts: tuple[ContextResult, ...]
    trained: Summary | None
    unseen: Summary | None
    classifier_accuracy: dict[str, float]
    base_presence: dict[str, float]
    leakage: Leakage
    attribute_leakage: Leakage | None
    strength_curves: tuple[StrengthCurve, ...]
    drift: Drift | None
    told_apart: ToldApart | None = None
    edits: tuple[EditResult, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, tuple[Tensor | None, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    texts: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the examples, for JSON."""
        values = dataclasses.asdict(dataclasses.replace(self, examples={}, texts={}))
        del values["examples"], values["texts"]
        return values
