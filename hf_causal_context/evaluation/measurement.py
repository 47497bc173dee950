"""Evidence -> report: every measure, and what a reader must be told about them.

Shapes: N rows, K concepts, A attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..contexts import Context
from .classifiers import RELIABLE_ACCURACY, ConceptClassifier, balanced_accuracy, train_classifier
from .comparison import gap_closed, means
from .context_results import context_result
from .evidence import Evidence
from .influence import leakage, strength_curve
from .metrics import sliced_wasserstein
from .readings import Readings
from .results import ContextResult, Drift, EvaluationReport, Leakage, StrengthCurve, Summary

NO_UNSEEN = (
    "No context that training left out was sampled and has real rows, so no combination can be compared with the "
    "truth. Still measured: the trained contexts, whether the classifiers find the requested concepts in unseen pairs "
    "(conformity), leakage and strength curves. The classifiers have seen no combination either: where one concept "
    "changes what another is recognised by, they can miss it in a combination that is right. To compare, add real rows "
    "of a combination, such as a folder 'thick+slant'; training leaves combinations out."
)


def measure(evidence: Evidence, seed: int = 0) -> EvaluationReport:
    """Measure everything. `seed` draws the splits of the real rows and the classifier's weights."""
    concepts, real = evidence.concepts, evidence.usable()
    learnt, judged = evidence.split(seed)
    classifier = train_classifier(learnt, concepts, seed)
    real_logits = {context: classifier.read(rows) for context, rows in judged.items()}
    logits = {
        context: [classifier.read(group.values) for group in groups] for context, groups in evidence.samples.items()
    }
    accuracy = balanced_accuracy(real_logits, concepts)
    results = tuple(
        context_result(evidence, context, logits[context], real_logits.get(context), seed)
        for context in evidence.samples
    )
    empty = torch.cat([group.values for group in evidence.samples[Context()]])
    distance = sliced_wasserstein(empty, torch.cat([group.values for group in evidence.base]))
    return EvaluationReport(
        concepts=concepts.names,
        notes=_notes(evidence, accuracy),
        contexts=results,
        trained=_summary(result for result in results if result.context and result.trained),
        unseen=_summary(result for result in results if result.context and not result.trained),
        classifier_accuracy=accuracy,
        leakage=leakage(
            concepts,
            concepts.names,
            {context: torch.cat(groups).sigmoid() for context, groups in logits.items()},
            {context: read.sigmoid() for context, read in real_logits.items()},
            "probability that the classifier gives",
        ),
        attribute_leakage=_attribute_leakage(evidence),
        strength_curves=tuple(_curve(evidence, classifier, concept) for concept in evidence.strengths),
        drift=Drift(evidence.largest_change, evidence.mean_change, distance),
        examples={
            str(context): (real[context].examples if context in real else None, groups[0].examples)
            for context, groups in evidence.samples.items()
        },
    )


def _attribute_leakage(evidence: Evidence) -> Leakage | None:
    if not evidence.attribute_names:
        return None

    def read(*rows: Readings) -> Tensor:
        return evidence.standardised(torch.cat([part.attributes for part in rows if part.attributes is not None]))

    samples = {context: read(*groups) for context, groups in evidence.samples.items()}
    real = {context: read(rows) for context, rows in evidence.usable().items()}
    unit = "attribute, in standard deviations of the observational real rows"
    return leakage(evidence.concepts, evidence.attribute_names, samples, real, unit)


def _curve(evidence: Evidence, classifier: ConceptClassifier, concept: str) -> StrengthCurve:
    curve = evidence.strengths[concept]
    k = evidence.concepts.index(concept)
    logits = {strength: classifier.read(rows.values)[:, k] for strength, rows in curve.items()}
    attribute = None
    if concept in evidence.attribute_names:
        column = evidence.attribute_names.index(concept)
        attribute = {s: rows.attributes[:, column] for s, rows in curve.items() if rows.attributes is not None}
    # The change was measured on whole pictures, of which a curve may hold smaller ones.
    at_zero = evidence.base[0].values[: len(curve[0.0])] if 0.0 in curve else None
    same = at_zero is not None and evidence.largest_change == 0 and torch.equal(curve[0.0].values, at_zero)
    return strength_curve(concept, logits, attribute, same)


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
    conformities = [result.conformity.mean for result in judged if result.conformity is not None]
    real = [result.real_conformity for result in judged if result.real_conformity is not None]
    return Summary(
        contexts=tuple(result.context for result in results),
        samples=samples,
        floor=floor,
        base=base,
        gap_closed=closed,
        conformity=sum(conformities) / len(conformities),
        real_conformity=sum(real) / len(real) if real else None,
    )


def _notes(evidence: Evidence, accuracy: Mapping[str, float]) -> tuple[str, ...]:
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
