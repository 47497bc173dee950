"""A report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .._markdown import table, text_cell
from .metrics import Estimate
from .results import ContextResult, Distances, EvaluationReport, Leakage, Summary
from .verdict import where_the_empty_context_is, where_the_empty_context_is_in_texts, worst_leak


def markdown(report: EvaluationReport) -> str:
    """Return the whole report as text."""
    lines = ["# Does it compose?", "", *(f"- {sentence}" for sentence in report.verdict.sentences), ""]
    lines += [f"> **Note.** {note}\n" for note in report.notes]
    for heading, part in (
        ("Distances", _distances(report)),
        ("Perplexity", _perplexities(report)),
        ("Attributes", _attributes(report)),
        ("FID and KID", _features(report)),
        ("Conformity", _conformity(report)),
        ("Leakage", _leakages(report)),
        ("Strength", _strengths(report)),
        ("Edits", _edits(report)),
        ("The empty context", _drift(report)),
        ("Texts", _texts(report)),
        ("How", _settings(report)),
    ):
        body = list(part)
        lines += [f"## {heading}", "", *body, ""] if body else []
    return "\n".join(lines).rstrip() + "\n"


def _distances(report: EvaluationReport) -> Iterator[str]:
    if report.drift is None:
        return
    yield (
        "Sliced Wasserstein distance to real rows (lower is better). *Floor*: as many other real rows in place of the "
        "samples. *Base*: without any adapter. *Gap closed*: 1 at the floor, 0 at the base. *Empty*: the samples of "
        "the empty context. *Diversity*: of the samples over that of real rows."
    )
    yield ""
    rows: list[tuple[str, ...]] = [
        (
            *_head(result),
            *_distance_cells(result.distance),
            "" if result.distance is None else _estimate(result.distance.empty),
            _number(result.diversity, 2),
            str(result.num_real),
        )
        for result in report.contexts
    ]
    for summary, name, trained in _summaries(report):
        if summary.samples is not None:
            numbers = [f"**{_number(value)}**" for value in (summary.samples, summary.floor, summary.base)]
            rows.append((f"**{name}**", trained, *numbers, f"**{_number(summary.gap_closed, 2)}**", "", "", ""))
    header = ("context", "data", "samples", "floor", "base", "gap closed", "empty", "diversity", "real rows")
    yield from table(header, rows)
    if any(estimate.half_width is not None for estimate in _estimates(report)):
        yield from (
            "",
            f"± is half the 95 % confidence interval over {report.settings.get('num_seeds', 'the')} seed groups.",
        )
    yield from _notes(report)


def _perplexities(report: EvaluationReport) -> Iterator[str]:
    if not any(result.perplexity for result in report.contexts):
        return
    learned = report.settings.get("perplexity_of", "all of their tokens")
    yield (
        f"Perplexity of real rows ({learned}; lower is likelier) in their context, in the empty one, and under the "
        "base without any adapter. The rows of trained contexts are training rows: their perplexity says what was "
        "learned, and only that of held-out rows what it is good for. *Diversity*: of the samples over that of real "
        "rows."
    )
    yield ""
    rows = []
    for result in report.contexts:
        scores = result.perplexity
        values = (scores.adapter, scores.empty, scores.base) if scores else (None, None, None)
        scored = str(scores.num_rows) if scores else "0"
        rows.append((*_head(result), *(_number(value, 2) for value in values), scored, _number(result.diversity, 2)))
    yield from table(("context", "data", "in its context", "in the empty one", "base", "real rows", "diversity"), rows)
    yield from _notes(report)


def _notes(report: EvaluationReport) -> Iterator[str]:
    if notes := [f"- {note}" for result in report.contexts for note in result.notes]:
        yield ""
        yield from notes


def _attributes(report: EvaluationReport) -> Iterator[str]:
    names = list(next((result.attributes for result in report.contexts if result.attributes), {}))
    if not names:
        return
    yield "Means read back from samples / real rows, and the sliced Wasserstein distance of standardized attributes."
    yield ""
    rows = []
    for result in report.contexts:
        ours, real = result.attributes or {}, result.real_attributes or {}
        cells = [f"{_number(ours.get(name), 2)} / {_number(real.get(name), 2)}" for name in names]
        rows.append((*_head(result), *cells, *_distance_cells(result.attribute_distance, 3)))
    yield from table(("context", "data", *names, "distance", "floor", "base", "gap closed"), rows)


def _features(report: EvaluationReport) -> Iterator[str]:
    if not any(result.frechet for result in report.contexts):
        return
    yield "Of the features of the extractor that was given, all seed groups together."
    yield ""
    rows = [
        (*_head(result), *_distance_cells(result.frechet, 3)[:3], *_distance_cells(result.kernel)[:3])
        for result in report.contexts
    ]
    columns = [f"{metric} {of}".strip() for metric in ("FID", "KID") for of in ("", "floor", "base")]
    yield from table(("context", "data", *columns), rows)


def _conformity(report: EvaluationReport) -> Iterator[str]:
    yield (
        "A classifier says for every concept whether it was intervened on. *Conformity*: share of samples in which it "
        "finds all requested concepts, beside that of real rows it did not learn from, of the base (without any "
        "adapter) and of the empty context. *Beyond the base*: (share - base) / (1 - base), of samples / real rows; 0 "
        "is what the base does by itself. Under each concept: how often it is found in samples / real rows; requested "
        "ones are bold."
    )
    yield ""
    accuracy = [f"*{report.classifier_accuracy[name]:.2f}*" for name in report.concepts]
    of_base = [f"*{report.base_presence[name]:.2f}*" for name in report.concepts]
    rows = [
        ("*balanced accuracy of the classifier*", *[""] * 6, *accuracy),
        ("*the base*", *[""] * 6, *of_base),
    ]
    for result in report.contexts:
        ours, real = result.presence, result.real_presence or {}
        targets = {item.partition("=")[0] for item in result.context.split("+")}
        cells = []
        for name in report.concepts:
            cell = f"{ours[name]:.2f} / {_number(real.get(name), 2)}"
            cells.append(f"**{cell}**" if name in targets else cell)
        shares = [result.real_conformity, result.base_conformity, result.empty_conformity]
        beyond = _beyond(result) if result.conformity is not None else ""
        conformity = [_estimate(result.conformity, 2), *(_number(share, 2) for share in shares), beyond]
        rows.append((*_head(result), *conformity, *cells))
    for summary, name, trained in _summaries(report):
        shares = [_number(share, 2) for share in (summary.conformity, summary.real_conformity, summary.base_conformity)]
        cells = [f"**{cell}**" if cell else "" for cell in (*shares, "", _beyond(summary))]
        rows.append((f"**{name}**", trained, *cells, *[""] * len(report.concepts)))
    header = ("context", "data", "conformity", "real", "base", "empty", "beyond the base", *report.concepts)
    yield from table(header, rows)


def _beyond(item: ContextResult | Summary) -> str:
    return f"{_number(item.conformity_beyond_base, 2)} / {_number(item.real_conformity_beyond_base, 2)}"


def _leakages(report: EvaluationReport) -> Iterator[str]:
    for item in (report.leakage, report.attribute_leakage):
        if item is not None:
            yield from _leakage(item)


def _leakage(item: Leakage) -> Iterator[str]:
    yield f"What do(row) does to a column ({item.reading}), beside the empty context: samples / real rows."
    yield ""
    rows = [
        (f"do({cause})", *(f"{a:+.2f} / {b:+.2f}" for a, b in zip(ours, truth, strict=True)))
        for cause, ours, truth in zip(item.causes, item.samples, item.data, strict=True)
    ]
    yield from table(("", *item.effects), rows)
    yield ""
    yield f"{worst_leak(item)}"
    yield ""


def _strengths(report: EvaluationReport) -> Iterator[str]:
    if not report.strength_curves:
        return
    texts = report.drift is None
    yield (
        f"Mean logit of a concept's classifier at each strength, from the same {'prompts' if texts else 'seeds'}, with "
        "the mean probability in brackets. *Monotone*: the logit never falls from 0 to 1"
        f"{' by more than chance' if texts else ''}."
    )
    yield ""
    strengths = sorted({strength for curve in report.strength_curves for strength in curve.strengths})
    rows = []
    for curve in report.strength_curves:
        read = zip(curve.strengths, curve.logits, curve.probabilities, strict=True)
        cells = {strength: f"{logit:+.1f} ({probability:.2f})" for strength, logit, probability in read}
        rows.append((curve.concept, *(cells.get(strength, "") for strength in strengths), _yes(curve.monotone)))
        if curve.attribute is not None:
            cells = {s: _number(value, 2) for s, value in zip(curve.strengths, curve.attribute, strict=True)}
            monotone = _yes(bool(curve.attribute_monotone))
            rows.append((f"{curve.concept} (attribute)", *(cells.get(s, "") for s in strengths), monotone))
    yield from table(("concept", *(f"{strength:g}" for strength in strengths), "monotone"), rows)
    yield from _responses(report, strengths)
    yield ""
    falls = [curve.concept for curve in report.strength_curves if not curve.monotone]
    yield f"Not monotone between 0 and 1: {', '.join(falls)}." if falls else "All are monotone between 0 and 1."
    if not all(curve.zero_is_empty for curve in report.strength_curves):
        yield "Strength 0 does not give the samples of the empty context."
    else:
        base = ", which is the base" if all(curve.zero_is_base for curve in report.strength_curves) else ""
        yield f"Strength 0 gives the samples of the empty context{base}, bit for bit."


def _responses(report: EvaluationReport, strengths: Sequence[float]) -> Iterator[str]:
    curves = [(curve, curve.response) for curve in report.strength_curves if curve.response is not None]
    if not curves:
        return
    yield ""
    read = ", ".join(sorted({response.reading for _, response in curves}))
    yield (
        "How far each strength goes, in units of the step from the empty context to strength 1: of samples / of real "
        f"rows at that strength, in units of their own step. Read are {read}."
    )
    yield ""
    rows = []
    for curve, response in curves:
        pairs = zip(curve.strengths, response.samples, response.truth, strict=True)
        cells = {s: f"{own:.2f}" + ("" if truth is None else f" / {truth:.2f}") for s, own, truth in pairs}
        rows.append((curve.concept, *(cells.get(strength, "") for strength in strengths), _yes(not response.falls)))
    yield from table(("concept", *(f"{strength:g}" for strength in strengths), "monotone"), rows)


def _edits(report: EvaluationReport) -> Iterator[str]:
    if not report.edits:
        return
    yield (
        "Observational images with a partner, edited to its context, beside the partner: root mean square difference "
        "(of images in [0, 1], lower is better), ± half the 95 % confidence interval over pairs. *No edit*: the images "
        "as they are."
    )
    features = any(result.feature_error for result in report.edits)
    if features:
        yield "*Features*: their cosine distance."
    yield ""
    rows = []
    for result in report.edits:
        cells = [result.error, result.unedited]
        cells += [result.feature_error, result.unedited_feature_error] if features else []
        share = result.error.mean / result.unedited.mean if result.unedited.mean else None
        trained = "trained" if result.trained else "held out"
        rows.append((result.context, trained, *map(_estimate, cells), _number(share, 2), str(result.num_pairs)))
    titles = ("edit", "no edit", *(("features", "features, no edit") if features else ()))
    yield from table(("context", "data", *titles, "edit / no edit", "pairs"), rows)
    gains = {result.context: result.gain for result in report.edits}
    nearer = [context for context, gain in gains.items() if gain.half_width is not None and gain.mean > gain.half_width]
    others = [context for context in gains if context not in nearer]
    yield ""
    yield (
        f"Beyond chance nearer to the truth than no edit: {', '.join(nearer) or 'none'}"
        f"{'; not: ' + ', '.join(others) if others else ''}."
    )


def _drift(report: EvaluationReport) -> Iterator[str]:
    drift = report.drift
    observational = next(result for result in report.contexts if not result.context)
    scores, told_apart = observational.perplexity, report.told_apart
    if drift is None and scores is not None and told_apart is not None:
        if scores.empty == scores.base:
            yield "It is the base: real rows have the same perplexity, bit for bit."
        yield where_the_empty_context_is_in_texts(scores, told_apart)
    if drift is None:
        return
    if drift.largest == 0:
        yield "It is the base, bit for bit."
        return
    yield (
        f"Beside the base at equal seeds: largest difference {drift.largest:.3g}, mean {drift.mean:.3g}; sliced "
        f"Wasserstein distance {drift.distance:.4f}."
    )
    if observational.distance is not None:
        yield where_the_empty_context_is(observational.distance)


def _texts(report: EvaluationReport) -> Iterator[str]:
    if not report.texts:
        return
    yield "Some samples, and real texts of the same contexts as the classifiers read them."
    yield ""
    rows = []
    for context, (real, samples) in report.texts.items():
        rows += [(context or "(observational)", whose, text_cell(text)) for whose, text in _sides(real, samples)]
    yield from table(("context", "", "text"), rows)


def _sides(real: Sequence[str], samples: Sequence[str]) -> list[tuple[str, str]]:
    return [("real", text) for text in real] + [("sample", text) for text in samples]


def _settings(report: EvaluationReport) -> Iterator[str]:
    if report.settings:
        yield ", ".join(f"{name} {value}" for name, value in report.settings.items() if value is not None) + "."


def _summaries(report: EvaluationReport) -> Iterator[tuple[Summary, str, str]]:
    if report.trained is not None:
        yield report.trained, "mean, trained", "trained"
    if report.unseen is not None:
        yield report.unseen, "mean, held out", "held out"


def _head(result: ContextResult) -> tuple[str, str]:
    return result.context or "(observational)", "trained" if result.trained else "held out"


def _distance_cells(distances: Distances | None, digits: int = 4) -> tuple[str, str, str, str]:
    if distances is None:
        return "", "", "", ""
    samples, floor, base = (_estimate(item, digits) for item in (distances.samples, distances.floor, distances.base))
    return samples, floor, base, _number(distances.gap_closed, 2)


def _estimates(report: EvaluationReport) -> Iterator[Estimate]:
    for result in report.contexts:
        if result.distance is not None:
            yield result.distance.samples


def _estimate(value: Estimate | None, digits: int = 4) -> str:
    if value is None:
        return ""
    width = "" if value.half_width is None else f" ± {value.half_width:.{digits}f}"
    return f"{value.mean:.{digits}f}{width}"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"
