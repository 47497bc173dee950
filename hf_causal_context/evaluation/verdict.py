"""What a report comes to, in a few sentences: the worst first.

A context is judged by these measures. Each is 1 where the samples do what real rows do, and 0 where they do what can be
had without the context, which is the better of the base's samples and of those of the adapter's empty context:

- *found*: (share - without) / (real - without) of the rows in which the classifiers find all that was asked for.
  `without` is the larger share of the two. A base that has as much as real rows have, before anything was learned, says
  that the classifiers are wrong about it: then the empty context's share alone counts. `real` is the share of judged
  real rows; of a combination without real rows the product of its single concepts' shares. Not measured where a
  classifier is unreliable, or where less than `MIN_CONTRAST` lies between `without` and `real`.
- *near*: (without - samples) / (without - floor) of the distances from real rows; `without` is the smaller distance of
  the two. Not measured where it is at the floor already, give or take `MIN_GAP`, and the samples are not far from there
  either: what a concept changes is then too small for this distance.
- *likely*, of texts, in place of distances: 1 where real rows are likelier in the context than without it, -1 where
  they are less likely, 0 where it makes no difference (`SAME_LIKELIHOOD`). It speaks against a context, not for it:
  real rows of a combination can be likelier although samples never show it. So alone a 1 is not counted.

The first two are ratios of what this data holds, so that they depend little on how many samples there are or how hard
the concept is to see. A single concept has no effect where everything measured is within `NOTHING` of 0; a context
fails where one measure is below that, and is weak where one is below `HALF`. The thresholds are coarse on purpose: a
tenth and a half of the way are no matter of noise in a hundred samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..contexts import Context
from .classifiers import RELIABLE_ACCURACY
from .results import ContextResult, Distances, Leakage, Perplexity, StrengthCurve, ToldApart, Verdict

NOTHING, HALF = 0.1, 0.5
MIN_CONTRAST = 0.2  # of shares
MIN_GAP = 0.25  # of the floor
FAR = 2.0  # times the floor: how near the base must be to the observational rows
FAR_TEXTS = 0.9  # balanced accuracy with which the base's texts are told from the observational ones
SAME_LIKELIHOOD = 0.005  # nats per token
CLOSER_TEXTS = 0.05  # nats per token
LARGE_LEAK = 0.25  # of a probability
FEW_SAMPLES = 30
ALIKE = 0.5  # of the diversity of real rows
MAX_LISTED, MAX_SENTENCES = 3, 8

_SINGLE, _COMBINATION, _AT_OTHERS = _KINDS = "concept", "combination", "context at other strengths"
_FAR = "The base is far from the observational set"


@dataclass(frozen=True)
class Judgment:
    """The measures of a context that could be taken, each with what it was taken from, in words."""

    name: str
    kind: str  # one of `_KINDS`
    measures: tuple[tuple[float, str], ...]

    @property
    def worst(self) -> float:
        """1 where nothing could be measured."""
        return min((value for value, _ in self.measures), default=1.0)

    @property
    def without_effect(self) -> bool:
        """Whether all that was measured is as without the context."""
        return bool(self.measures) and all(abs(value) < NOTHING for value, _ in self.measures)


def verdict(
    results: Sequence[ContextResult],
    accuracy: Mapping[str, float],
    leak: Leakage,
    told_apart: ToldApart | None = None,
    curves: Sequence[StrengthCurve] = (),
) -> Verdict:
    """Judge the contexts of a report.

    Args:
        results: of all contexts, the empty one among them.
        accuracy: balanced accuracy of each concept's classifier.
        leak: of the classifiers.
        told_apart: of texts.
        curves: of strengths.
    """
    empty = next(result for result in results if not result.context)
    singles = {result.context: result for result in results}
    asked = [_judge(result, singles, accuracy) for result in results if _is_asked_for(result)]
    base, base_is_right = _of_base(empty) if told_apart is None else _of_base_texts(empty, told_apart)
    problems = [*_failures(asked), *([] if base_is_right else [base]), *_leak(leak, accuracy), *_alike(results)]
    unjudged = [judgment.name for judgment in asked if not judgment.measures]
    judged = [judgment for judgment in asked if judgment.measures]
    right = [judgment for judgment in judged if judgment.worst >= HALF]
    sentences = [*problems]
    if right:
        everything = "everything that could be judged" if unjudged else "everything asked for"
        rest = "the rest" if len(right) < len(judged) else f"apart from that {everything}" if problems else everything
        sentences.append(f"{rest[0].upper()}{rest[1:]} works: {_counted(right)}.")
    if unjudged:
        sentences.append(
            f"Not judged: {_listed(unjudged)}. There, neither classifiers nor distances tell real rows from samples "
            "without it."
        )
    sentences += [base] if base and base_is_right else []
    idle = {judgment.name for judgment in asked if judgment.without_effect}
    sentences += [*_strengths([c for c in curves if c.concept not in idle]), *_remarks(results, empty, accuracy)]
    if len(sentences) > MAX_SENTENCES:
        sentences = [*sentences[: MAX_SENTENCES - 1], "There is more: see below."]
    return Verdict(not problems and not unjudged and bool(right), tuple(sentences))


def worst_leak(leak: Leakage) -> str:
    """Return the largest excess of a leak in samples over that in the data, in words."""
    if leak.worst_cause is None or leak.worst_effect is None or leak.worst_excess is None:
        return "There is nothing that one concept could leak into."
    if leak.worst_excess <= 0:
        return "No concept acts on another one more than in the data."
    i, j = leak.causes.index(leak.worst_cause), leak.effects.index(leak.worst_effect)
    ours, truth = leak.samples[i][j], leak.data[i][j]
    begin = f"Largest leak: do({leak.worst_cause}) changes {leak.worst_effect} by {ours:+.2f} in samples and "
    if ours * truth < 0:
        return begin + f"the other way, by {truth:+.2f}, in the data: {abs(ours - truth):.2f} apart."
    return begin + f"by {truth:+.2f} in the data, {leak.worst_excess:.2f} too much."


def where_the_empty_context_is(distance: Distances) -> str:
    """Whether the empty context is nearer to the observational rows than the base, in words."""
    base, empty, floor = distance.base.mean, distance.samples.mean, distance.floor.mean
    margin = MIN_GAP * floor
    moved = (
        "moved towards" if empty < base - margin else "moved away from" if empty > base + margin else "is as far from"
    )
    return (
        f"The empty context {moved} the observational rows{' as the base' if moved.startswith('is') else ''}: its "
        f"distance from them is {empty:.3g}, the base's {base:.3g}, that of other observational rows {floor:.3g}."
    )


def where_the_empty_context_is_in_texts(scores: Perplexity, told_apart: ToldApart) -> str:
    """Return the same of texts."""
    gain = math.log(scores.base) - math.log(scores.empty)
    moved = "moved towards" if gain > CLOSER_TEXTS else "moved away from" if gain < -CLOSER_TEXTS else "is as far from"
    return (
        f"The empty context {moved} the observational rows{' as the base' if moved.startswith('is') else ''}: their "
        f"perplexity is {_figure(scores.empty)} in it, {_figure(scores.base)} under the base; its texts are told from "
        f"them in {told_apart.empty:.2f} of cases, the base's in {told_apart.base:.2f} (0.5 is guessing)."
    )


def _is_asked_for(result: ContextResult) -> bool:
    """Whether a context is judged: without real rows, other strengths than 1 do not say what should be found."""
    context = Context.parse(result.context)
    at_one = context.observational == 1 and set(context.strengths.values()) == {1.0}
    return bool(context.targets) and (at_one or result.real_conformity is not None)


def _judge(result: ContextResult, singles: Mapping[str, ContextResult], accuracy: Mapping[str, float]) -> Judgment:
    targets = Context.parse(result.context).targets
    found, found_words = None, ""
    if all(accuracy[name] >= RELIABLE_ACCURACY for name in targets):
        real = result.real_conformity
        if real is None:
            shares = [singles[name].real_conformity for name in targets if name in singles]
            real = math.prod(share for share in shares if share is not None)
        found, found_words = _found(result, real)
    near, near_words = (None, "") if result.distance is None else _near(result.distance)
    pairs = ((found, found_words), (near, near_words))
    measures = [(value, words) for value, words in pairs if value is not None]
    if result.perplexity is not None:
        likely, words = _likely(result.perplexity)
        measures += [(likely, words)] if likely <= 0 or measures else []
    strengths = Context.parse(result.context).strengths.values()
    kind = _AT_OTHERS if set(strengths) != {1.0} else _SINGLE if len(targets) == 1 else _COMBINATION
    return Judgment(result.context, kind, tuple(measures))


def _found(result: ContextResult, real: float) -> tuple[float | None, str]:
    assert result.conformity is not None
    assert result.base_conformity is not None
    assert result.empty_conformity is not None
    share, without = result.conformity.mean, max(result.base_conformity, result.empty_conformity)
    if real - without < MIN_CONTRAST:
        without = result.empty_conformity
    if real - without < MIN_CONTRAST:
        return None, ""
    expected = f"{real:.2f} of real rows" if result.real_conformity is not None else f"{real:.2f} expected"
    words = f"found in {share:.2f} of its samples, {without:.2f} without it, {expected}"
    return (share - without) / (real - without), words


def _near(distance: Distances) -> tuple[float | None, str]:
    samples, floor = distance.samples.mean, distance.floor.mean
    without = min(distance.base.mean, (distance.empty or distance.base).mean)
    words = f"distance from real rows {samples:.2g}, {without:.2g} without it, {floor:.2g} of other real rows"
    if without - floor > MIN_GAP * floor:
        return (without - samples) / (without - floor), words
    # There is no way to go, but one can go the wrong way.
    return (-1.0, words) if samples > FAR * max(without, floor) else (None, "")


def _likely(perplexity: Perplexity) -> tuple[float, str]:
    without = min(perplexity.base, perplexity.empty)
    gain = math.log(without) - math.log(perplexity.adapter)
    words = f"perplexity of real rows {_figure(perplexity.adapter)}, {_figure(without)} without it"
    return (0.0 if abs(gain) < SAME_LIKELIHOOD else 1.0 if gain > 0 else -1.0), words


def _failures(asked: Sequence[Judgment]) -> Iterator[str]:
    nothing = [judgment for judgment in asked if judgment.kind == _SINGLE and judgment.without_effect]
    others = [judgment for judgment in asked if judgment not in nothing]
    singles = [judgment for judgment in asked if judgment.kind == _SINGLE]
    if nothing and len(nothing) == len(singles) and all(judgment.worst < NOTHING for judgment in others):
        yield f"The adapter has no effect. {_reasons(nothing)}."
        return
    if nothing:
        yield f"No effect: {_reasons(nothing)}."
    others = sorted(others, key=lambda judgment: judgment.worst)
    if failing := [judgment for judgment in others if judgment.worst < NOTHING]:
        yield f"Fails: {_reasons(failing)}."
    if weak := [judgment for judgment in others if NOTHING <= judgment.worst < HALF]:
        yield f"Weak: {_reasons(weak)}."


def _of_base(empty: ContextResult) -> tuple[str, bool]:
    """What to say of a base that is far from the observational set, and whether the empty context makes up for it."""
    distance = empty.distance
    if distance is None:
        return "", True
    samples, base, floor = distance.samples.mean, distance.base.mean, distance.floor.mean
    if base <= FAR * floor:
        moved_away = samples > FAR * max(floor, base)
        return where_the_empty_context_is(distance) if moved_away else "", not moved_away
    closed = (base - samples) / (base - floor)
    begin = f"{_FAR} (distance {base:.3g}, {floor:.3g} of other observational rows)"
    if closed >= HALF:
        return f"{begin}; the empty context closes {closed:.2f} of that.", True
    return _not_made_up_for(begin, distance.samples == distance.base, f"closes {max(0.0, closed):.2f} of that"), False


def _of_base_texts(empty: ContextResult, told_apart: ToldApart) -> tuple[str, bool]:
    """The same for texts, of which no distance is known: can they be told from real ones, and how likely are these?"""
    assert empty.perplexity is not None
    scores = empty.perplexity
    gain = math.log(scores.base) - math.log(scores.empty)
    if gain < -CLOSER_TEXTS:
        return where_the_empty_context_is_in_texts(scores, told_apart), False
    if told_apart.base < FAR_TEXTS:
        return "", True
    begin = (
        f"{_FAR} (told from it in {told_apart.base:.2f} of its texts; perplexity of real ones {_figure(scores.base)})"
    )
    if gain > CLOSER_TEXTS:
        return f"{begin}; the empty context is nearer ({told_apart.empty:.2f}; {_figure(scores.empty)}).", True
    return _not_made_up_for(begin, gain == 0, f"is no nearer ({told_apart.empty:.2f}; {_figure(scores.empty)})"), False


def _not_made_up_for(begin: str, is_base: bool, otherwise: str) -> str:
    done = "is the base" if is_base else otherwise
    advice = "with an observational part" if is_base else "longer, or with a larger"
    return (
        f"{begin}, and the empty context {done}: concepts learn the rest, and combinations add it up. Train {advice} "
        f"{'(--observational_rank)' if is_base else '--observational_rank'}."
    )


def _leak(leak: Leakage, accuracy: Mapping[str, float]) -> Iterator[str]:
    if (leak.worst_excess or 0.0) > LARGE_LEAK and accuracy[str(leak.worst_effect)] >= RELIABLE_ACCURACY:
        yield worst_leak(leak)


def _alike(results: Sequence[ContextResult]) -> Iterator[str]:
    alike = [r for r in results if r.diversity is not None and r.diversity < ALIKE]
    if alike:
        named = [f"{result.context or 'the empty context'} ({result.diversity:.2f})" for result in alike]
        yield f"Samples are too much alike (their diversity beside that of real rows): {_listed(named)}."


def _strengths(curves: Sequence[StrengthCurve]) -> Iterator[str]:
    responses = {curve.concept: curve.response for curve in curves if curve.response is not None}
    falls = [
        f"{name} falls at {', '.join(f'{strength:g}' for strength in response.falls)}"
        for name, response in responses.items()
        if response.falls
    ]
    if falls:
        yield f"Not monotone: more strength is not always more of the concept ({_listed(falls, '; ')})."
    elif responses:
        highest = max(strength for curve in curves for strength in curve.strengths)
        yield f"More strength is more of the concept, from 0 to {highest:g}: {_listed(list(responses))}."


def _remarks(results: Sequence[ContextResult], empty: ContextResult, singles: Collection[str]) -> Iterator[str]:
    for result in results:
        if result.context in singles and result.real_conformity is not None:
            assert result.base_conformity is not None
            if result.base_conformity > max(0.5, result.real_conformity - MIN_CONTRAST):
                yield (
                    f"The classifiers find {result.context} in {result.base_conformity:.2f} of the base's own samples: "
                    "what they say of the base means little."
                )
    blind = [r.context for r in results if _is_asked_for(r) and r.real_conformity is None]
    if blind:
        yield f"Without real rows, judged by the classifiers alone: {_listed(blind)}."
    if empty.num_samples < FEW_SAMPLES:
        yield f"{empty.num_samples} samples per context are few: draw more before you rely on this."


def _reasons(judgments: Sequence[Judgment]) -> str:
    """Contexts, each with its worst measure; where nothing has an effect, both are as bad, and shares say more."""
    reasons = [j.measures[0] if j.without_effect else min(j.measures) for j in judgments]
    return _listed([f"{j.name} ({words})" for j, (_, words) in zip(judgments, reasons, strict=True)], "; ")


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = len(items) - MAX_LISTED
    return separator.join(items[:MAX_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")


def _figure(perplexity: float) -> str:
    return f"{perplexity:.3g}" if perplexity < 1000 else f"{perplexity:,.0f}"


def _counted(judgments: Sequence[Judgment]) -> str:
    counts = Counter(judgment.kind for judgment in judgments)
    words = [f"{num} {_plural(kind) if num > 1 else kind}" for kind in _KINDS if (num := counts[kind])]
    return " and ".join(words) if len(words) < 3 else f"{words[0]}, {words[1]} and {words[2]}"


def _plural(kind: str) -> str:
    first, *rest = kind.split(" ")
    return " ".join([f"{first}s", *rest])
