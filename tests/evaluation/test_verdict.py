"""The verdict: what it says of results whose meaning is known."""

import dataclasses
import json

import pytest
import torch

from hf_causal_context.contexts import ConceptSet
from hf_causal_context.evaluation import metrics
from hf_causal_context.evaluation.comparison import gap_closed
from hf_causal_context.evaluation.influence import leakage
from hf_causal_context.evaluation.markdown import markdown
from hf_causal_context.evaluation.metrics import Estimate
from hf_causal_context.evaluation.report import write_report
from hf_causal_context.evaluation.results import ContextResult, Distances, Perplexity
from hf_causal_context.evaluation.verdict import MAX_SENTENCES, verdict, where_the_empty_context_is, worst_leak

from .small import CONCEPTS, CONTEXTS, OBS, PAIR, A, B, draw, groups, real_rows, report, result_of, right_samples

RELIABLE = dict.fromkeys("abcde", 0.95)


@pytest.fixture(autouse=True)
def _rough_distances(monkeypatch):
    monkeypatch.setattr(metrics, "NUM_PROJECTIONS", 50)


def distances(samples, base, empty=None, floor=0.1):
    empty = base if empty is None else empty
    return Distances(*map(Estimate, (samples, floor, base)), gap_closed(samples, floor, base), Estimate(empty))


def result(name, share=0.9, real=0.9, base=0.02, empty=0.02, distance=None, diversity=1.0, num_samples=100):
    asked = bool(name)
    return ContextResult(
        context=name,
        trained="+" not in name,
        num_real=100,
        num_samples=num_samples,
        num_compared=50,
        distance=distance,
        attribute_distance=None,
        frechet=None,
        kernel=None,
        conformity=Estimate(share) if asked else None,
        real_conformity=real if asked else None,
        base_conformity=base if asked else None,
        empty_conformity=empty if asked else None,
        conformity_beyond_base=None,
        real_conformity_beyond_base=None,
        presence={},
        real_presence=None,
        attributes=None,
        real_attributes=None,
        diversity=diversity,
        notes=(),
    )


def leak_of(samples=0.0, data=0.0):
    """do(a) changes b by `samples` where the data say `data`; nothing else happens."""
    concepts = ConceptSet(CONCEPTS)

    def read(change):
        return {OBS: torch.zeros(1, 2), A: torch.tensor([[0.9, change]]), B: torch.tensor([[0.0, 0.9]])}

    return leakage(concepts, CONCEPTS, read(samples), read(data), "probability")


def judged(*results, accuracy=None, leak=None):
    if not any(not item.context for item in results):
        results = (result(""), *results)
    return verdict(results, accuracy or RELIABLE, leak or leak_of())


def test_an_adapter_that_does_everything_is_told_in_one_sentence(tmp_path):
    found = report()
    assert found.verdict.works
    assert found.verdict.sentences == ("Everything asked for works: 2 concepts and 1 combination.",)
    assert markdown(found).startswith(f"# Does it compose?\n\n- {found.verdict.sentences[0]}\n\n## Distances")
    values = json.loads(write_report(found, tmp_path)[0].read_text())
    assert values["verdict"] == {"works": True, "sentences": list(found.verdict.sentences)}


def test_samples_of_the_base_have_no_effect():
    (sentence,) = report(dict.fromkeys(CONTEXTS, groups())).verdict.sentences
    assert sentence.startswith("The adapter has no effect. a (found in 0.0")
    assert "; b (found in 0.0" in sentence


def test_a_pair_that_shows_one_of_its_concepts_fails_and_the_rest_works():
    found = report({**right_samples(), PAIR: groups(A)}).verdict
    assert not found.works
    fails, rest = found.sentences
    assert fails.startswith("Fails: a+b (found in 0.0")
    assert fails.endswith(f"{result_of(report(), PAIR).real_conformity:.2f} of real rows).")
    assert rest == "The rest works: 2 concepts."


def test_one_concept_without_effect_comes_before_the_pairs_that_fail_with_it():
    found = report({**right_samples(), B: groups(), PAIR: groups(A)}).verdict.sentences
    assert [sentence.partition(" (")[0] for sentence in found] == [
        "No effect: b", "Fails: a+b", "The rest works: 1 concept."
    ]  # fmt: skip


def test_samples_that_show_the_concept_but_are_farther_than_without_it_fail():
    """Where a combination adds up what every concept learned of the data's look."""
    broken = distances(1.476, base=0.54, floor=0.07)
    (fails, _) = judged(result("a"), result("a+b", distance=broken)).sentences
    assert fails == "Fails: a+b (distance from real rows 1.5, 0.54 without it, 0.07 of other real rows)."


def test_half_of_the_way_is_weak():
    (weak, rest) = judged(result("a", share=0.4), result("b")).sentences
    assert weak == "Weak: a (found in 0.40 of its samples, 0.02 without it, 0.90 of real rows)."
    assert rest == "The rest works: 1 concept."
    assert judged(result("a", share=0.47)).works


@pytest.mark.parametrize("without", [{"base": 0.5, "empty": 0.0}, {"base": 0.0, "empty": 0.5}])
def test_samples_are_compared_with_the_better_of_the_base_and_the_empty_context(without):
    assert not judged(result("a", share=0.6, **without)).works
    assert judged(result("a", share=0.6, base=0, empty=0)).works
    near = {"base": 1.0, "empty": 1.0} | {name: 0.2 for name, share in without.items() if share}
    assert not judged(result("a", distance=distances(0.18, **near))).works
    assert judged(result("a", distance=distances(0.18, base=1.0, empty=1.0))).works


def test_a_base_that_is_taken_for_the_concept_does_not_hide_its_effect():
    works, remark = judged(result("a", base=0.88, empty=0.1)).sentences
    assert works == "Everything asked for works: 1 concept."
    assert remark == "The classifiers find a in 0.88 of the base's own samples: what they say of the base means little."
    nothing = judged(result("a", share=0.88, base=0.88, empty=0.88))
    assert not nothing.works
    assert nothing.sentences[0].startswith("Not judged: a.")
    assert judged(result("a", share=0.88, base=0.88, empty=0.88, distance=distances(1.0, 1.0))).sentences[0] == (
        "The adapter has no effect. a (distance from real rows 1, 1 without it, 0.1 of other real rows)."
    )


def test_unreliable_classifiers_are_not_believed():
    found = judged(result("a", share=0.0), accuracy={"a": 0.7})
    assert found.sentences == (
        "Not judged: a. There, neither classifiers nor distances tell real rows from samples without it.",
    )
    assert judged(result("a", share=0.0, distance=distances(0.12, 1.0)), accuracy={"a": 0.7}).works
    both = judged(result("a", share=0.0), result("b"), accuracy={"a": 0.7, "b": 0.9}).sentences
    assert both[0] == "Everything that could be judged works: 1 concept."


def test_small_gaps_between_distances_are_not_read():
    """A concept that changes little is judged by classifiers, unless samples are far from everything."""
    assert judged(result("a", distance=distances(0.13, base=0.12))).works
    far = judged(result("a", distance=distances(0.5, base=0.12))).sentences[0]
    assert far == "Fails: a (distance from real rows 0.5, 0.12 without it, 0.1 of other real rows)."


def test_combinations_without_real_rows_are_judged_by_what_their_concepts_show():
    pair = result("a+b", share=0.05, real=None)
    fails, _, remark = judged(result("a"), result("b"), pair).sentences
    assert fails == "Fails: a+b (found in 0.05 of its samples, 0.02 without it, 0.81 expected)."
    assert remark == "Without real rows, judged by the classifiers alone: a+b."
    half = judged(result("a"), result("b"), result("a=0.5+b", share=0.1, real=None))
    assert half.works, "half a strength need not be found"
    assert judged(result("a"), result("a+observational=0.0", share=0.1, real=None)).works, "nor in the base's world"


def test_a_base_far_from_the_observational_set_is_said_with_what_the_empty_context_does():
    far = judged(result("", distance=distances(2.0, base=2.0)), result("a")).sentences
    assert far[0].startswith("The base is far from the observational set (distance 2, 0.1 of other observational rows)")
    assert "the empty context is the base" in far[0]
    assert "Train with an observational part (--observational_rank)." in far[0]
    assert far[1] == "Apart from that everything asked for works: 1 concept."
    little = judged(result("", distance=distances(1.62, base=2.0)), result("a"))
    assert "the empty context closes 0.20 of that" in little.sentences[0]
    assert "a larger --observational_rank" in little.sentences[0]
    assert not little.works
    closed = judged(result("", distance=distances(0.12, base=2.0)), result("a"))
    assert closed.works
    assert closed.sentences[1].endswith("; the empty context closes 0.99 of that.")
    away = judged(result("", distance=distances(0.5, base=0.12)), result("a"))
    assert away.sentences[0].startswith("The empty context moved away from the observational rows: its distance")
    assert not away.works


def scored(name, adapter, empty=20.0, base=20.0, **options):
    return dataclasses.replace(result(name, **options), perplexity=Perplexity(adapter, empty, base, 50))


def test_likelihoods_of_texts_speak_against_a_context_and_not_for_it():
    assert judged(scored("a", 15.0)).works
    (none,) = judged(scored("a", 20.0, share=0.02)).sentences
    assert none.startswith("The adapter has no effect. a (found in 0.02")
    (shown,) = judged(scored("a", 15.0, share=0.02)).sentences
    assert shown.startswith("Fails: a (found in 0.02"), "an effect that samples do not show"
    worse = judged(scored("a", 19.0, empty=18.0)).sentences[0]
    assert worse == "Fails: a (perplexity of real rows 19, 18 without it)."
    unreliable = judged(scored("a", 15.0), accuracy={"a": 0.6})
    assert unreliable.sentences[0].startswith("Not judged: a.")
    diverged = judged(scored("a", float("inf"))).sentences[0]
    assert diverged == "Fails: a (perplexity of real rows inf, 20 without it)."


def test_where_the_empty_context_went_is_said():
    assert "moved towards the observational rows:" in where_the_empty_context_is(distances(0.1, base=1.0))
    assert "moved away from the observational rows:" in where_the_empty_context_is(distances(1.0, base=0.1))
    assert "is as far from the observational rows as the base:" in where_the_empty_context_is(distances(0.51, base=0.5))
    moved = report(base=[rows + 1.0 for rows in groups()])
    assert "The empty context moved towards the observational rows: its distance" in markdown(moved)
    assert "It is the base, bit for bit." in markdown(report())


def test_an_effect_the_other_way_is_a_leak_of_all_that_it_is():
    leak = leak_of(0.22, -0.15)
    assert leak.difference[0][1] == pytest.approx(0.37)
    assert leak.worst_excess == pytest.approx(0.22)
    assert worst_leak(leak) == (
        "Largest leak: do(a) changes b by +0.22 in samples and the other way, by -0.15, in the data: 0.37 apart."
    )
    leak = leak_of(-0.5, -0.15)
    assert (leak.worst_excess, leak.difference[0][1]) == (pytest.approx(0.35), pytest.approx(-0.35))
    assert worst_leak(leak).endswith("by -0.50 in samples and by -0.15 in the data, 0.35 too much.")


def test_an_effect_that_is_missing_is_no_leak():
    assert leak_of(0.05, 0.4).worst_excess == pytest.approx(0)  # the cell of do(b) and a
    assert leak_of(0.01, -0.4).worst_excess == pytest.approx(0.01)
    assert worst_leak(leak_of(-0.1, -0.4)) == "No concept acts on another one more than in the data."


def test_large_leaks_are_in_the_verdict_if_their_classifier_is_reliable():
    leak = leak_of(0.5, 0.1)
    assert judged(result("a"), leak=leak).sentences[0] == worst_leak(leak)
    assert judged(result("a"), leak=leak_of(0.2, 0.0)).works
    assert judged(result("a"), leak=leak, accuracy={"a": 0.9, "b": 0.7}).works


def test_samples_without_diversity_and_few_samples_are_said():
    alike = judged(result("a", diversity=0.1)).sentences[0]
    assert alike == "Samples are too much alike (their diversity beside that of real rows): a (0.10)."
    few = judged(result("", num_samples=6), result("a")).sentences
    assert few[-1] == "6 samples per context are few: draw more before you rely on this."


def test_long_lists_are_cut():
    failing = [result("a", share=0.6), *(result(f"a+{name}", share=0.0) for name in "bcde")]
    sentence = judged(*failing).sentences[0]
    assert sentence.count("found in") == 3
    assert sentence.endswith("; and 1 more.")
    worst = judged(
        result("", distance=distances(2.0, base=2.0), diversity=0.1, num_samples=6),
        result("a", share=0.0, base=0.95),
        result("b", share=0.4),
        result("c"),
        result("a+b", share=0.0),
        result("a+c", real=None),
        result("d", real=0.1),
        leak=leak_of(0.5),
    )
    assert len(worst.sentences) == MAX_SENTENCES
    assert worst.sentences[-1] == "There is more: see below."


def test_conformity_is_given_beside_the_bases_own_rate():
    smiling = [rows + torch.tensor([4.0, 0, 0, 0]) for rows in groups()]
    found = report(base=smiling)
    a, b, pair = (result_of(found, context) for context in (A, B, PAIR))
    assert a.base_conformity == found.base_presence["a"] > 0.9
    assert b.base_conformity == found.base_presence["b"] < 0.1
    assert a.empty_conformity < 0.1
    for item in (a, b, pair):
        share, base = item.conformity.mean, item.base_conformity
        assert item.conformity_beyond_base == pytest.approx((share - base) / (1 - base))
        assert item.real_conformity_beyond_base == pytest.approx((item.real_conformity - base) / (1 - base))
    assert found.trained.base_conformity == pytest.approx((a.base_conformity + b.base_conformity) / 2)
    assert found.trained.conformity_beyond_base == pytest.approx(
        (found.trained.conformity - found.trained.base_conformity) / (1 - found.trained.base_conformity)
    )
    assert result_of(found, OBS).base_conformity is None
    text = markdown(found)
    assert f"| *the base* |  |  |  |  |  |  | *{a.base_conformity:.2f}* | *{b.base_conformity:.2f}* |" in text
    assert f"| {pair.conformity_beyond_base:.2f} / {pair.real_conformity_beyond_base:.2f} |" in text


def test_nothing_goes_beyond_a_base_that_always_shows_it():
    assert metrics.beyond_base(1.0, 1.0) is None
    assert metrics.beyond_base(0.9, 0.0) == 0.9
    assert metrics.beyond_base(0.88, 0.88) == 0
    assert metrics.beyond_base(0.0, 0.5) == -1


def test_distances_of_the_empty_context_stand_beside_the_others():
    moved = {**right_samples(), OBS: [rows + 1.0 for rows in groups()]}
    found = result_of(report(moved, base=groups()), A).distance
    assert found.empty.mean != found.base.mean
    same = result_of(report(), A).distance
    assert same.empty == same.base


def test_without_rows_of_a_pair_the_whole_report_says_so():
    real = real_rows()
    del real[PAIR]
    found = report(real=real).verdict
    assert found.works
    assert found.sentences[-1] == "Without real rows, judged by the classifiers alone: a+b."


def test_a_concept_that_cannot_be_seen_is_not_called_right():
    shown = {c: [name for name in c.targets if name == "a"] for c in CONTEXTS}
    real = {context: draw(200, seen, seed=n) for n, (context, seen) in enumerate(shown.items())}
    found = report({context: groups(seen) for context, seen in shown.items()}, real=real).verdict
    assert not found.works
    assert "Not judged: b." in found.sentences[1]
