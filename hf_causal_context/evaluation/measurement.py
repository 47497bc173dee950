"""Evidence -> report: every measure, and what a reader must be told about them.

Shapes: N rows, K concepts, A attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..contexts import ConceptSet, Context
from ..messages.progress import ProgressBar
from .classifiers import RELIABLE_ACCURACY, ConceptClassifier, at_one, balanced_accuracy, train_classifier
from .comparison import gap_closed, means
from .context_results import Logits, context_result, named
from .evidence import EvaluationInputs
from .influence import leakage, strength_curve
from .metrics import beyond_base, sliced_wasserstein
from .readings import Measurements
from .response import response
from .results import ContextResult, Drift, EvaluationReport, Leakage, StrengthCurve, Summary, ToldApart
from .verdict import verdict

NO_UNSEEN = (
    "No context that training left out was sampled and has real rows, so no combination can be compared with the "
    "truth. Still measured: the trained contexts, whether the classifiers find the requested concepts in unseen pairs "
    "(conformity), leakage and strength curves. The classifiers have seen no combination either: where one concept "
    "changes what another is recognized by, they can miss it in a combination that is right. To compare, add real rows "
    "of a combination, such as a folder 'thick+slant'; training leaves combinations out."
)


def measure(evidence: EvaluationInputs, seed: int = 0) -> EvaluationReport:
    """Measure everything. `seed` draws the splits of the real rows and the classifier's weights."""
    concepts, real = evidence.concepts, evidence.usable()
    learned, judged = evidence.split(seed)
    # What is weaker or reversed is no example of a concept; it is read by what strength 1 taught.
    learned = {context: rows for context, rows in learned.items() if at_one(context)}
    classifier = train_classifier(learned, concepts, seed, linear=evidence.holds_texts)
    logits = Logits(
        samples={c: [classifier.read(group.values) for group in groups] for c, groups in evidence.samples.items()},
        base=[classifier.read(group.values) for group in evidence.base],
        real={context: classifier.read(rows) for context, rows in judged.items()},
    )
    accuracy = balanced_accuracy({c: read for c, read in logits.real.items() if at_one(c)}, concepts)
    bar = ProgressBar(evidence.samples, desc="measure", unit="context")
    results = tuple(context_result(evidence, context, logits, seed) for context in bar)
    told_apart = None
    if evidence.holds_texts:
        told_apart = _told_apart(evidence, learned[Context()], judged[Context()], seed)
    curves = tuple(_curve(evidence, classifier, concept) for concept in evidence.strengths)
    leak = leakage(
        concepts,
        concepts.names,
        {context: torch.cat(list(groups)).sigmoid() for context, groups in logits.samples.items()},
        {context: read.sigmoid() for context, read in logits.real.items()},
        "probability that the classifier gives",
    )
    return EvaluationReport(
        concepts=concepts.names,
        verdict=verdict(results, accuracy, leak, told_apart, curves),
        notes=_notes(evidence, accuracy),
        contexts=results,
        trained=_summary(result for result in results if result.conformity is not None and result.trained),
        unseen=_summary(result for result in results if result.conformity is not None and not result.trained),
        classifier_accuracy=accuracy,
        base_presence=named(concepts.names, (torch.cat(list(logits.base)) > 0).float().mean(0)),
        leakage=leak,
        attribute_leakage=_attribute_leakage(evidence),
        strength_curves=curves,
        drift=_drift(evidence),
        told_apart=told_apart,
        examples={
            str(context): (real[context].examples if context in real else None, groups[0].examples)
            for context, groups in evidence.samples.items()
        },
    )


def _drift(evidence: EvaluationInputs) -> Drift | None:
    if evidence.holds_texts:
        return None
    empty, base = (torch.cat([g.values for g in groups]) for groups in (evidence.samples[Context()], evidence.base))
    return Drift(evidence.largest_change, evidence.mean_change, sliced_wasserstein(empty, base))


def _told_apart(evidence: EvaluationInputs, learned: Tensor, judged: Tensor, seed: int) -> ToldApart:
    """Each set of texts is divided as the observational real ones are: to learn from, and to be judged."""
    other = ConceptSet(("other",))
    accuracy = []
    for groups in (evidence.base, evidence.samples[Context()]):
        texts = torch.cat([group.values for group in groups])
        cut = max(1, round(len(texts) * len(judged) / (len(judged) + len(learned))))
        classifier = train_classifier({Context(): learned, Context("other"): texts[cut:]}, other, seed, linear=True)
        read = {Context(): classifier.read(judged), Context("other"): classifier.read(texts[:cut])}
        accuracy.append(balanced_accuracy(read, other)["other"])
    return ToldApart(*accuracy)


def _attribute_leakage(evidence: EvaluationInputs) -> Leakage | None:
    if not evidence.attribute_names:
        return None

    def read(*rows: Measurements) -> Tensor:
        return evidence.standardized(torch.cat([part.attributes for part in rows if part.attributes is not None]))

    samples = {context: read(*groups) for context, groups in evidence.samples.items()}
    real = {context: read(rows) for context, rows in evidence.usable().items()}
    unit = "attribute, in standard deviations of the observational real rows (as it is where these are alike)"
    return leakage(evidence.concepts, evidence.attribute_names, samples, real, unit)


def _curve(evidence: EvaluationInputs, classifier: ConceptClassifier, concept: str) -> StrengthCurve:
    curve = evidence.strengths[concept]
    k = evidence.concepts.index(concept)
    logits = {strength: classifier.read(rows.values)[:, k] for strength, rows in curve.items()}
    attribute = None
    if concept in evidence.attribute_names:
        column = evidence.attribute_names.index(concept)
        attribute = {s: rows.attributes[:, column] for s, rows in curve.items() if rows.attributes is not None}

    def equal_at_zero(others: Measurements) -> bool:
        return 0.0 in curve and torch.equal(curve[0.0].values, others.values[: len(curve[0.0])])

    if evidence.perplexities is not None:  # texts of the base are drawn by themselves
        observational = evidence.perplexities[Context()]
        is_base = observational.empty == observational.base
    else:
        # The change was measured on whole images, of which a curve may hold smaller ones.
        is_base = evidence.largest_change == 0 and equal_at_zero(evidence.base[0])
    is_empty = equal_at_zero(evidence.samples[Context()][0])
    measured = strength_curve(concept, logits, attribute, is_base, is_empty, paired=not evidence.holds_texts)
    return replace(measured, response=response(evidence, concept))


def _summary(results: Iterable[ContextResult]) -> Summary | None:
    results = tuple(results)
    if not results:
        return None
    compared = [result.distance for result in results if result.distance is not None]
    samples, floor, base = means(compared) if compared else (None, None, None)
    closed = (
        gap_closed(samples, floor, base) if samples is not None and floor is not None and base is not None else None
    )
    judged = [result for result in results if result.real_conformity is not None] or results
    conformity, of_base, of_real = (
        _mean(values)
        for values in (
            [result.conformity.mean for result in judged if result.conformity is not None],
            [result.base_conformity for result in judged if result.base_conformity is not None],
            [result.real_conformity for result in judged if result.real_conformity is not None],
        )
    )
    assert conformity is not None  # every context here asks for a concept
    assert of_base is not None
    return Summary(
        contexts=tuple(result.context for result in results),
        samples=samples,
        floor=floor,
        base=base,
        gap_closed=closed,
        conformity=conformity,
        real_conformity=of_real,
        base_conformity=of_base,
        conformity_beyond_base=beyond_base(conformity, of_base),
        real_conformity_beyond_base=None if of_real is None else beyond_base(of_real, of_base),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _notes(evidence: EvaluationInputs, accuracy: Mapping[str, float]) -> tuple[str, ...]:
    notes = []
    if not any(context not in evidence.trained and context in evidence.samples for context in evidence.usable()):
        notes.append(NO_UNSEEN)
    notes += [
        f"Conformity of {concept!r} is not reliable, nor is anything else that its classifier says: on held-out real "
        f"rows it has a balanced accuracy of {value:.2f} (0.5 is guessing, {RELIABLE_ACCURACY} is asked). More real "
        "rows help, if a single row shows the concept at all."
        for concept, value in accuracy.items()
        if value < RELIABLE_ACCURACY
    ]
    return tuple(notes)
