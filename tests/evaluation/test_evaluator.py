"""The evaluation of samples whose quality is known: right ones, those of the base, leaking and collapsed ones."""

import numpy as np
import pytest
import torch

from hf_causal_context.contexts import Context
from hf_causal_context.evaluation import evaluator
from hf_causal_context.evaluation.markdown import markdown

from .small import CONCEPTS, CONTEXTS, OBS, PAIR, A, B, draw, groups, real_rows, report, result_of, right_samples


def test_right_samples_are_at_the_floor_and_conform_like_real_rows():
    found = report()
    for context in CONTEXTS:
        result = result_of(found, context)
        assert result.distance.samples.mean == pytest.approx(result.distance.floor.mean, rel=0.5)
        assert result.diversity == pytest.approx(1, abs=0.1)
        assert (result.num_real, result.num_samples, result.num_compared) == (200, 120, 60)
        assert not result.notes
    for context in (A, B, PAIR):
        result = result_of(found, context)
        assert result.distance.gap_closed > 0.9
        assert result.distance.base.mean > 5 * result.distance.floor.mean
        assert result.conformity.mean == pytest.approx(result.real_conformity, abs=0.1)
        assert result.conformity.mean > 0.85
    assert result_of(found, OBS).conformity is None
    assert result_of(found, OBS).distance.gap_closed is None, "the base is at the floor: nothing to close"
    assert torch.tensor(found.leakage.difference).abs().max() < 0.1
    assert (found.drift.largest, found.drift.mean) == (0, 0)
    assert found.drift.distance == pytest.approx(0, abs=1e-9)
    assert min(found.classifier_accuracy.values()) > 0.9
    assert found.trained.contexts == ("a", "b")
    assert found.unseen.contexts == ("a+b",)
    assert found.unseen.gap_closed == result_of(found, PAIR).distance.gap_closed
    assert not found.notes


def test_samples_of_the_base_close_no_gap_and_do_not_conform():
    found = report(dict.fromkeys(CONTEXTS, groups()))
    for context in (A, B, PAIR):
        assert result_of(found, context).distance.gap_closed == 0
        assert result_of(found, context).conformity.mean < 0.1
        assert result_of(found, context).real_conformity > 0.9
    assert result_of(found, OBS).presence["a"] < 0.1
    assert torch.tensor(found.leakage.samples).abs().max() == 0
    assert found.leakage.data[0][0] > 0.8


def test_half_of_the_requested_concepts_is_not_conformity():
    found = report({**right_samples(), PAIR: groups(A)})
    result = result_of(found, PAIR)
    assert result.conformity.mean < 0.1
    assert result.presence["a"] > 0.9
    assert result.presence["b"] < 0.1
    assert 0.1 < result.distance.gap_closed < 0.8


def test_a_leak_is_found_and_named():
    found = report({**right_samples(), A: groups(PAIR)})
    assert (found.leakage.worst_cause, found.leakage.worst_effect) == ("a", "b")
    assert found.leakage.data[0][1] > 0
    assert found.leakage.worst_excess == pytest.approx(found.leakage.samples[0][1] - abs(found.leakage.data[0][1]))
    assert found.leakage.worst_excess > 0.8
    assert "Largest leak: do(a) changes b by +" in markdown(found)
    silent = report(dict.fromkeys(CONTEXTS, groups()))
    assert silent.leakage.worst_excess <= 0
    assert "No concept acts on another one more than in the data." in markdown(silent)


def test_collapsed_samples_are_not_diverse():
    collapsed = [rows[:1].expand(len(rows), -1) + 0.01 * rows for rows in groups(A)]
    assert result_of(report({**right_samples(), A: collapsed}), A).diversity < 0.05


def test_drift_and_what_strength_zero_is():
    moved = {**right_samples(), OBS: [rows + 0.25 for rows in groups()]}
    found = report(moved, base=groups(), strength_samples={"a": curve(lambda s: s)})
    assert found.drift.largest == pytest.approx(0.25)
    assert found.drift.mean == pytest.approx(0.25)
    assert found.drift.distance > 0.05
    assert not found.strength_curves[0].zero_is_base
    assert not found.strength_curves[0].zero_is_empty
    assert "Strength 0 does not give the samples of the empty context." in markdown(found)


def test_strength_zero_is_the_empty_context_which_need_not_be_the_base():
    found = report(base=[rows + 0.25 for rows in groups()], strength_samples={"a": curve(lambda s: s)})
    assert found.strength_curves[0].zero_is_empty
    assert not found.strength_curves[0].zero_is_base
    assert "Strength 0 gives the samples of the empty context, bit for bit." in markdown(found)
    same = report(strength_samples={"a": curve(lambda s: s)})
    assert "Strength 0 gives the samples of the empty context, which is the base, bit for bit." in markdown(same)


def curve(shape, strengths=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)):
    """Samples of "a" whose shift at strength s is shape(s), from the base's first seeds."""
    return {s: draw(60, {"a": shape(s)}, seed=101)[:30] for s in strengths}


@pytest.mark.parametrize(
    ("shape", "monotone"),
    [
        (lambda s: s, True),
        (lambda s: min(s, 1.0), True),
        (lambda s: s if s <= 1 else 0.5, True),  # beyond 1 nothing is asked
        (lambda s: 0.0, True),  # no effect at all is not a fall
        (lambda s: s if s != 0.75 else 0.3, False),
        (lambda s: -s, False),
    ],
)
def test_strength_curves(shape, monotone):
    read = {"attributes": lambda rows: rows[:, :1], "attribute_names": ("a",)}
    (found,) = report(strength_samples={"a": curve(shape)}, **read).strength_curves
    assert found.concept == "a"
    assert found.strengths == (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    assert found.monotone == monotone
    assert found.zero_is_base
    assert found.zero_is_empty
    expected = [4 * shape(s) for s in found.strengths]
    assert np.subtract(found.attribute, found.attribute[0]) == pytest.approx(expected, abs=1e-5)
    assert found.attribute_monotone == (monotone or shape(1.0) == -1), "an attribute may fall all the way"
    if not monotone:
        assert "Not monotone between 0 and 1: a." in markdown(report(strength_samples={"a": curve(shape)}))


def test_a_curve_that_does_not_start_at_the_base_is_reported():
    found = report(strength_samples={"a": curve(lambda s: s + 0.1)}).strength_curves[0]
    assert not found.zero_is_base
    assert not found.zero_is_empty


def test_attributes_are_read_beside_real_ones_and_may_be_missing():
    def read(rows):
        attributes = rows[:, :2] * torch.tensor([10.0, 1.0])
        attributes[0] = torch.nan
        return attributes

    found = report({**right_samples(), A: groups(PAIR)}, attributes=read, attribute_names=("b", "a"))
    # the names are swapped on purpose: "b" is what concept a shifts
    result = result_of(found, B)
    assert result.attributes["a"] == pytest.approx(4, abs=0.5)
    assert result.real_attributes["a"] == pytest.approx(4, abs=0.3)
    assert result.attribute_distance.gap_closed > 0.9
    assert result.attribute_distance.base.mean == pytest.approx(4 / 2**0.5, rel=0.2), "in standard deviations"
    assert "(observational): 1.7% of the samples have no readable attributes" in markdown(found)
    leak = found.attribute_leakage
    assert leak.effects == ("b", "a")
    assert np.array(leak.data) == pytest.approx(np.array([[4, 0], [0, 4]]), abs=0.5)
    assert np.array(leak.samples)[0] == pytest.approx([4, 4], abs=0.5)


def test_the_largest_leak_is_one_of_those_that_could_be_read():
    def read(rows):
        attributes = rows[:, :2].clone()
        attributes[rows[:, 3] > 50, 0] = torch.nan
        return attributes

    samples = {**right_samples(), A: groups(PAIR)}  # a leaks into b
    for rows in samples[A]:
        rows[:, 3] = 100
    leak = report(samples, attributes=read, attribute_names=("ink", "b")).attribute_leakage
    assert np.isnan(leak.samples[0][0])
    assert (leak.worst_cause, leak.worst_effect) == ("a", "b")
    assert leak.worst_excess == pytest.approx(4, abs=0.5)


@pytest.mark.slow
def test_intervals_over_seed_groups():
    found = result_of(report(right_samples(seeds=(1, 2, 3))), PAIR)
    assert 0 < found.distance.samples.half_width < found.distance.samples.mean
    assert found.conformity.half_width is not None
    alone = result_of(report(right_samples(seeds=(1,))), PAIR)
    assert alone.distance.samples.half_width is None
    assert "±" not in markdown(report(right_samples(seeds=(1,))))


def test_it_is_deterministic_and_leaves_the_random_states_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = report()
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(4)
    assert report().to_dict() == first.to_dict()
    assert report(seed=1).to_dict() != first.to_dict()


def test_without_unseen_rows_it_says_what_is_still_measured():
    real = real_rows()
    del real[PAIR]
    found = report(real=real)
    assert "no combination can be compared with the truth. Still measured" in markdown(found)[:300]
    result = result_of(found, PAIR)
    assert result.distance is None
    assert result.conformity.mean > 0.7, "the classifiers, which never saw a pair, find both concepts all the same"
    assert found.unseen.samples is None
    assert "a+b: no real rows, so nothing to compare with" in markdown(found)
    assert any("can be compared" in note for note in report(trained=CONTEXTS).notes), "the oracle trained on them"


def test_a_concept_that_cannot_be_seen_is_said_to_be_unreliable():
    real = {context: draw(200, [c for c in context.targets if c == "a"], seed=n) for n, context in enumerate(CONTEXTS)}
    found = report(real=real)
    assert found.classifier_accuracy["a"] > 0.9
    assert found.classifier_accuracy["b"] < 0.7
    (note,) = found.notes
    assert "Conformity of 'b' is not reliable" in note
    assert note in markdown(found)[:600]


def test_few_real_rows_are_used_and_said():
    found = report(real={**real_rows(), PAIR: draw(50, PAIR, seed=9), B: draw(10, B, seed=9)})
    result = result_of(found, PAIR)
    assert (result.num_real, result.num_compared) == (50, 25)
    assert result.distance.gap_closed > 0.8
    assert "a+b: 50 real rows were read, less than twice the 60 samples" in markdown(found)
    assert "distances compare 25 of the samples with 25 real rows" in markdown(found)
    assert result_of(found, B).num_compared == 5


def test_too_few_real_rows_are_skipped_or_refused():
    found = report(real={**real_rows(), PAIR: draw(9, PAIR)})
    assert result_of(found, PAIR).distance is None
    assert "a+b: 9 real rows, of which at least 10 are needed to compare" in markdown(found)
    assert "no combination can be compared" in found.notes[0]
    with pytest.raises(ValueError, match="The context 'a' has 9 real rows. At least 10 are needed"):
        report(real={**real_rows(), A: draw(9, A)})
    with pytest.raises(ValueError, match=r"The context '\(observational\)' has 0 real rows"):
        report(real={A: draw(20, A), B: draw(20, B)})


def test_wrong_use():
    broken = groups(PAIR)
    broken[1][3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Samples of context 'a\+b' contain NaN or infinite values. An adapter that"):
        report({**right_samples(), PAIR: broken})
    with pytest.raises(ValueError, match="samples= lacks 'b'"):
        report(right_samples([OBS, A]))
    with pytest.raises(ValueError, match=r"Context 'a' has groups of \[60\] samples, the base of \[60, 60\]"):
        report({**right_samples(), A: groups(A, seeds=(1,))})
    with pytest.raises(ValueError, match="Unknown concept 'c' in context 'c'"):
        report({**right_samples(), Context("c"): groups()})
    with pytest.raises(ValueError, match="Unknown concept 'c'"):
        report(strength_samples={"c": curve(lambda s: s)})
    with pytest.raises(ValueError, match=r"Rows of shape \(3,\) and of shape \(4,\) cannot be compared"):
        report(real={**real_rows(), A: torch.zeros(20, 3)})
    with pytest.raises(ValueError, match="attributes= and attribute_names= go together"):
        report(attributes=lambda rows: rows)
    with pytest.raises(ValueError, match=r"attributes= returned shape \(200, 4\) for 200 rows and 2 attribute_names="):
        report(attributes=lambda rows: rows, attribute_names=CONCEPTS)
    with pytest.raises(ValueError, match=r"base_samples= holds groups of \[\] samples"):
        report(base=[])


def test_classifiers_are_judged_by_rows_they_did_not_learn_from(monkeypatch):
    monkeypatch.setattr(evaluator, "measure", lambda evidence, seed: evidence)
    learned, judged = report().split(seed=0)
    for context, rows in real_rows().items():
        assert (len(learned[context]), len(judged[context])) == (140, 60)
        both = torch.cat([learned[context], judged[context]])
        assert torch.equal(both.sort(0).values, rows.sort(0).values)
