"""How far strengths go: beside the truth, and in words."""

import json

import pytest
import torch

from hf_causal_context.contexts import Context
from hf_causal_context.evaluation import asked, measurement
from hf_causal_context.evaluation.classifiers import train_classifier
from hf_causal_context.evaluation.markdown import markdown
from hf_causal_context.evaluation.report import write_report
from hf_causal_context.evaluation.sampling import STRENGTHS

from .small import OBS, PAIR, A, B, draw, groups, real_rows, report, result_of, right_samples


def curve(shape, num=60, strengths=STRENGTHS):
    return {s: draw(60, {"a": shape(s)}, seed=101)[:num] for s in strengths}


def root(s):
    return abs(s) ** 0.5


def response_to(shape, real=None, **options):
    samples = right_samples()
    found = report(samples, real=real, strength_samples={"a": curve(shape)}, **options)
    return found, found.strength_curves[0].response


def test_the_way_is_in_steps_from_the_empty_context_to_strength_1():
    _, response = response_to(lambda s: 0.5 * root(s))
    assert response.samples == pytest.approx([root(s) for s in STRENGTHS], abs=1e-5)
    assert (response.falls, response.num_samples, response.num_real) == ((), 60, 200)
    assert response.truth == (0, None, None, None, 1, None, None)


def test_real_rows_at_a_strength_are_the_truth_beside_it():
    real = real_rows(400) | {Context({"a": s}): draw(400, {"a": root(s)}, seed=int(100 * s)) for s in (0.25, 1.5)}
    found, response = response_to(lambda s: s, real)
    assert response.truth[1] == pytest.approx(0.5, abs=0.05)
    assert response.truth[-1] == pytest.approx(root(1.5), abs=0.05)
    assert f"| a | 0.00 / 0.00 | 0.25 / {response.truth[1]:.2f} | 0.50 |" in markdown(found)


def test_attributes_and_features_are_read_where_there_are_some():
    read = {"attributes": lambda rows: rows[:, :1] ** 3, "attribute_names": ("a",)}
    _, response = response_to(lambda s: s, **read)
    assert response.reading == "attributes"
    assert response.samples[2] < 0.3, "cubes grow late"


def test_samples_do_not_choose_the_direction():
    """Of 300 entries that are chance, a step that samples choose themselves would make a way of half a step."""
    noise = {s: torch.cat([rows, torch.randn(60, 300, generator=torch.Generator().manual_seed(int(s * 100)))], 1)
             for s, rows in curve(lambda s: float(s >= 1)).items()}  # fmt: skip

    def wide(rows, seed):
        return torch.cat([rows, torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(seed))], 1)

    real = {context: wide(rows, i) for i, (context, rows) in enumerate(real_rows(1000).items())}
    samples = {c: [wide(part, 50 + i) for i, part in enumerate(parts)] for c, parts in right_samples().items()}
    response = report(samples, real=real, strength_samples={"a": noise}).strength_curves[0].response
    assert response.samples[1:4] == pytest.approx([0, 0, 0], abs=0.15)


def test_the_verdict_says_whether_more_strength_is_more():
    found, _ = response_to(root)
    assert "More strength is more of the concept, from 0 to 1.5: a." in found.verdict.sentences
    found, response = response_to(lambda s: s if s <= 1 else 0.6)
    assert response.falls == (1.25,)
    sentence = "Not monotone: more strength is not always more of the concept (a falls at 1.25)."
    assert sentence in found.verdict.sentences
    assert "| **no** |" in markdown(found)


def test_without_an_effect_there_is_no_way_to_speak_of():
    found, response = response_to(lambda s: 0.0)
    assert response is None
    assert not any("strength" in sentence for sentence in found.verdict.sentences)


def test_a_curve_without_0_and_1_has_no_step_to_measure_by():
    for strengths in ((0.0, 0.5), (0.5, 1.0)):
        found = report(strength_samples={"a": curve(lambda s: s, strengths=strengths)})
        assert found.strength_curves[0].response is None


def test_classifiers_learn_strength_1_alone(monkeypatch):
    learned = []

    def train(rows, *args, **options):
        learned.append(set(rows))
        return train_classifier(rows, *args, **options)

    monkeypatch.setattr(measurement, "train_classifier", train)
    half, back = Context({"a": 0.5}), Context({"a": -1.0})
    real = real_rows() | {half: draw(200, half, seed=30), back: draw(200, back, seed=31)}
    samples = right_samples() | {half: groups(half), back: groups(back)}
    found = report(samples, real=real)
    assert learned == [{OBS, A, B, PAIR}]
    assert min(found.classifier_accuracy.values()) > 0.9
    assert result_of(found, half).conformity.mean == pytest.approx(result_of(found, half).real_conformity, abs=0.2)
    assert found.verdict.sentences[0].startswith("Everything asked for works: 2 concepts, 1 combination and 2 contexts")


def test_strengths_with_few_rows_are_not_sampled(tmp_path):
    real = {OBS: range(20), A: range(20), B: range(20), Context({"a": 0.5}): range(9), Context({"b": 0.5}): range(10)}
    concepts = asked.ConceptSet(("a", "b"))
    contexts, _ = asked.contexts_to_sample(concepts, None, real, [OBS, A, B])
    assert Context({"a": 0.5}) not in contexts
    assert Context({"b": 0.5}) in contexts


def test_the_report_holds_it_as_json_and_as_a_plot(tmp_path):
    found, response = response_to(root)
    paths = write_report(found, tmp_path)
    stored = json.loads(paths[0].read_text())["strength_curves"][0]["response"]
    assert stored["samples"] == pytest.approx(response.samples)
    assert (tmp_path / "report.png").stat().st_size > 0
