"""What a report comes to, in a few sentences: the worst first.

A context is judged by two measures. Each is 1 where the samples do what real rows do, and 0 where they do what can be
had without the context, which is the better of the base's samples and of those of the adapter's empty context:

- *found*: (share - without) / (real - without) of the rows in which the classifiers find all that was asked for.
  `without` is the larger share of the two. A base that has as much as real rows have, before anything was learned, says
  that the classifiers are wrong about it: then the empty context's share alone counts. `real` is the share of judged
  real rows; of a combination without real rows the product of its single concepts' shares. Not measured where a
  classifier is unreliable, or where less than `MIN_CONTRAST` lies between `without` and `real`.
- *near*: (without - samples) / (without - floor) of the distances from real rows; `without` is the smaller distance of
  the two. Not measured where it is at the floor already, give or take `MIN_GAP`, and the samples are not far from there
  either: what a concept changes is then too small for this distance.

Both are ratios of what this data holds, so that they depend little on how many samples there are or how hard the
concept is to see. A single concept has no effect where everything measured is within `NOTHING` of 0; a context fails
where one measure is below that, and is weak where one is below `HALF`. The thresholds are coarse on purpose: a tenth
and a half of the way are no matter of noise in a hundred samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..contexts import Context
from .classifiers import RELIABLE_ACCURACY
from .results import ContextResult, Distances, Leakage, Verdict

NOTHING, HALF = 0.1, 0.5
MIN_CONTRAST = 0.2  # of shares
MIN_GAP = 0.25  # of the floor
FAR = 2.0  # times the floor: how near the base must be to the observational rows
LARGE_LEAK = 0.25  # of a probability
FEW_SAMPLES = 30
ALIKE = 0.5  # of the diversity of real rows
MAX_LISTED, MAX_SENTENCES = 3, 8


@dataclass(frozen=True)
class Judgement:
    """A context's measures, None where they could not be taken, each with what it was taken from, in words."""

    name: str
    single: bool
    found: float | None
    found_words: str
    near: float | None
    near_words: str

    @property
    def measures(self) -> list[tuple[float, str]]:
        """Those that could be taken."""
        pairs = [(self.found, self.found_words), (self.near, self.near_words)]
        return [(value, words) for value, words in pairs if value is not None]

    @property
    def worst(self) -> float:
        """1 where nothing could be measured."""
        return min((value for value, _ in self.measures), default=1.0)

    @property
    def without_effect(self) -> bool:
        """Whether all that was measured is as without the context."""
        return bool(self.measures) and all(abs(value) < NOTHING for value, _ in self.measures)


def verdict(results: Sequence[ContextResult], accuracy: Mapping[str, float], leak: Leakage) -> Verdict:
    """Judge the contexts of a report.

    Args:
        results: of all contexts, the empty one among them.
        accuracy: balanced accuracy of each concept's classifier.
        leak: of the classifiers.
    """
    empty = next(result for result in results if not result.context)
    singles = {result.context: result for result in results}
    asked = [_judge(result, singles, accuracy) for result in results if _is_asked_for(result)]
    problems = [*_failures(asked), *_of_base(empty), *_leak(leak, accuracy), *_alike(results)]
    unjudged = [judgement.name for judgement in asked if not judgement.measures]
    judged = [judgement for judgement in asked if judgement.measures]
    right = [judgement for judgement in judged if judgement.worst >= HALF]
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
    sentences += _remarks(results, empty, accuracy)
    if len(sentences) > MAX_SENTENCES:
        sentences = [*sentences[: MAX_SENTENCES - 1], "There is more: see below."]
    return Verdict(not problems and not unjudged and bool(right), tuple(sentences))


def worst_leak(leak: Leakage) -> str:
    """The largest excess of a leak in samples over that in the data, in words."""
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


def _is_asked_for(result: ContextResult) -> bool:
    """Whether a context is judged: without real rows, other strengths than 1 do not say what should be found."""
    context = Context.parse(result.context)
    at_one = context.observational == 1 and set(context.strengths.values()) == {1.0}
    return bool(context.targets) and (at_one or result.real_conformity is not None)


def _judge(result: ContextResult, singles: Mapping[str, ContextResult], accuracy: Mapping[str, float]) -> Judgement:
    targets = Context.parse(result.context).targets
    found, found_words = None, ""
    if all(accuracy[name] >= RELIABLE_ACCURACY for name in targets):
        real = result.real_conformity
        if real is None:
            shares = [singles[name].real_conformity for name in targets if name in singles]
            real = math.prod(share for share in shares if share is not None)
        found, found_words = _found(result, real)
    near, near_words = (None, "") if result.distance is None else _near(result.distance)
    return Judgement(result.context, len(targets) == 1, found, found_words, near, near_words)


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


def _failures(asked: Sequence[Judgement]) -> Iterator[str]:
    nothing = [judgement for judgement in asked if judgement.single and judgement.without_effect]
    others = [judgement for judgement in asked if judgement not in nothing]
    singles = [judgement for judgement in asked if judgement.single]
    if nothing and len(nothing) == len(singles) and all(judgement.worst < NOTHING for judgement in others):
        yield f"The adapter has no effect. {_reasons(nothing)}."
        return
    if nothing:
        yield f"No effect: {_reasons(nothing)}."
    others = sorted(others, key=lambda judgement: judgement.worst)
    if failing := [judgement for judgement in others if judgement.worst < NOTHING]:
        yield f"Fails: {_reasons(failing)}."
    if weak := [judgement for judgement in others if NOTHING <= judgement.worst < HALF]:
        yield f"Weak: {_reasons(weak)}."


def _of_base(empty: ContextResult) -> Iterator[str]:
    """A base far from the observational set is a problem where the empty context does not make up for it."""
    if (far := _far_base(empty)) is not None and not far[1]:
        yield far[0]
    elif far is None and empty.distance is not None:
        distance = empty.distance
        if distance.samples.mean > FAR * max(distance.floor.mean, distance.base.mean):
            yield where_the_empty_context_is(distance)


def _far_base(empty: ContextResult) -> tuple[str, bool] | None:
    """A sentence, and whether the empty context makes up for it; None for a base that is near enough."""
    if empty.distance is None or empty.distance.base.mean <= FAR * empty.distance.floor.mean:
        return None
    base, floor, closed = empty.distance.base.mean, empty.distance.floor.mean, empty.distance.gap_closed
    assert closed is not None
    begin = f"The base is far from the observational set (distance {base:.3g}, {floor:.3g} of other observational rows)"
    if closed >= HALF:
        return f"{begin}; the empty context closes {closed:.2f} of that.", True
    if empty.distance.samples == empty.distance.base:
        missing, advice = "the empty context is the base", "Train with an observational part (--observational_rank)"
    else:
        missing = f"the empty context closes {max(0.0, closed):.2f} of that"
        advice = "Train longer, or with a larger --observational_rank"
    return f"{begin}, and {missing}: concepts learn the rest, and combinations add it up. {advice}.", False


def _leak(leak: Leakage, accuracy: Mapping[str, float]) -> Iterator[str]:
    if (leak.worst_excess or 0.0) > LARGE_LEAK and accuracy[str(leak.worst_effect)] >= RELIABLE_ACCURACY:
        yield worst_leak(leak)


def _alike(results: Sequence[ContextResult]) -> Iterator[str]:
    alike = [r for r in results if r.diversity is not None and r.diversity < ALIKE]
    if alike:
        named = [f"{result.context or 'the empty context'} ({result.diversity:.2f})" for result in alike]
        yield f"Samples are too much alike (their diversity beside that of real rows): {_listed(named)}."


def _remarks(results: Sequence[ContextResult], empty: ContextResult, singles: Collection[str]) -> Iterator[str]:
    if (far := _far_base(empty)) is not None and far[1]:
        yield far[0]
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


def _reasons(judgements: Sequence[Judgement]) -> str:
    """Contexts, each with its worst measure; where nothing has an effect, both are as bad, and shares say more."""
    reasons = [j.measures[0] if j.without_effect else min(j.measures) for j in judgements]
    return _listed([f"{j.name} ({words})" for j, (_, words) in zip(judgements, reasons, strict=True)], "; ")


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = len(items) - MAX_LISTED
    return separator.join(items[:MAX_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")


def _counted(judgements: Sequence[Judgement]) -> str:
    counts: list[tuple[int, str]] = [
        (sum(judgement.single for judgement in judgements), "concept"),
        (sum(not judgement.single for judgement in judgements), "combination"),
    ]
    return " and ".join(f"{num} {word}{'s' if num > 1 else ''}" for num, word in counts if num)
