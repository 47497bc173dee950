"""A judge of the user's own reads samples and real texts."""

import json
import sys

import pytest
import torch

from hf_causal_context import ConceptSet, Context
from hf_causal_context.cli import main
from hf_causal_context.evaluation import text_evaluator
from hf_causal_context.evaluation.evidence import EvaluationInputs
from hf_causal_context.evaluation.judges import Judged, load_judge
from hf_causal_context.evaluation.readings import Measurements
from hf_causal_context.evaluation.text_evaluator import evaluate_texts

from ..training.small_language import word_tokenizer
from .test_texts import (  # noqa: F401 (fixtures)
    CONTEXTS,
    FAST,
    adapted,
    adapter,
    command,
    data_of,
    folder,
    quick,
    texts,
)


def judge(text):
    return {"loud": text.endswith("loudly"), "words": len(text.split())}


def test_a_judge_reads_samples_and_real_texts(quick):  # noqa: F811
    report = evaluate_texts(adapted(), word_tokenizer(), data_of(), **FAST | {"max_new_tokens": 16}, judge=judge)
    real = {result.context: result.real_attributes for result in report.contexts}
    written = texts()
    for context in CONTEXTS:
        shares = [judge(text) for text in written[context]]
        assert real[str(context)]["loud"] == pytest.approx(sum(each["loud"] for each in shares) / len(shares))
        assert real[str(context)]["words"] == pytest.approx(sum(each["words"] for each in shares) / len(shares))
    assert all(0 < result.attributes["words"] <= 16 for result in report.contexts)
    # No plain text is loud, so there is no standard deviation to divide by.
    leakage = report.attribute_leakage
    place = leakage.causes.index("loud"), leakage.effects.index("loud")
    assert leakage.data[place[0]][place[1]] == pytest.approx(1.0)
    formal, loud = report.strength_curves
    assert (formal.attribute, len(loud.attribute)) == (None, len(loud.strengths))


def test_an_answer_of_no_use_is_an_error_before_samples_are_drawn(monkeypatch):
    monkeypatch.setattr(text_evaluator, "sample_all_texts", lambda *arguments: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="Its numbers must be finite"):
        evaluate_texts(adapted(), word_tokenizer(), data_of(), **FAST, judge=lambda text: {"loud": float("nan")})


def test_the_command_takes_a_dotted_name(adapter, folder, tmp_path, quick, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "own_judge.py").write_text("def shows(text):\n    return {'loud': 'loudly' in text}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as of an installed command
    options = ["--judge", "own_judge.shows", "--max_new_tokens", "16"]
    assert main(command(adapter, folder, tmp_path / "out", *options)) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["judge"] == "own_judge.shows"
    assert {each["context"]: each["real_attributes"]["loud"] for each in report["contexts"]} == {
        str(context): float("loud" in context.targets) for context in CONTEXTS
    }
    settings = tmp_path / "settings.yaml"
    settings.write_text("judge: own_judge.shows\n")
    assert main([*command(adapter, folder, tmp_path / "other"), "--config", str(settings)]) == 1
    assert "names a judge, which is code, and settings files may come from others" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shows", "--judge=shows must be a module and a function, such as my_module.judge"),
        (".rules.shows", "must be a module and a function"),
        ("rules.", "must be a module and a function"),
        ("no_such.shows", "the module 'no_such' cannot be imported .*Run the command where no_such.py is"),
        ("json.shows", "the module 'json' has no function 'shows'. It has .*'dumps', .*'load', .*. Name one of them"),
        ("this_file/judge.py", "judge.py: give a dotted name such as judge.shows, .* not a file"),
        ("judge.py", "give a dotted name such as judge.shows"),
        ("./judge.shows", "give a dotted name such as judge.shows"),
    ],
)
def test_names_of_no_function(name, message):
    with pytest.raises(ValueError, match=message):
        load_judge(name)


def test_a_deviation_that_is_rounding_is_none():
    values = torch.full((12, 1), 33333.33)
    assert values.std() > 1e-3
    evidence = EvaluationInputs(
        concepts=ConceptSet(("loud",)),
        real={each: Measurements(values, values, None, values) for each in (Context(), Context("loud"))},
        samples={},
        base=[],
        strengths={},
        trained=frozenset(),
        largest_change=0.0,
        mean_change=0.0,
        attribute_names=("large",),
    )
    assert evidence.standardized(values + 2).tolist() == [[pytest.approx(2, abs=0.01)]] * 12


def test_a_module_that_is_no_python_is_named(tmp_path, monkeypatch):
    (tmp_path / "half_a_judge.py").write_text("def shows(text:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"the module 'half_a_judge' cannot be read: .*half_a_judge.py, line 1"):
        load_judge("half_a_judge.shows")


def test_a_module_without_functions_is_told(tmp_path, monkeypatch):
    (tmp_path / "no_judge.py").write_text("from json import loads\ndef _hidden(text): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match="the module 'no_judge' has no function 'shows'. It has none of its own. Write"
    ):
        load_judge("no_judge.shows")


@pytest.mark.parametrize("answer", [0.5, {}, {"loud": "very"}, {"loud": None}])
def test_answers_that_are_no_numbers_by_name(answer):
    with pytest.raises(ValueError, match="The judge answered .* to 'a cat'.*numbers by name"):
        Judged(lambda text: answer)(["a cat"])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "-inf"])
def test_answers_that_are_not_finite_name_the_text(number):
    with pytest.raises(ValueError, match="The judge answered .*'loud'.* to 'a dog'. Its numbers must be finite"):
        Judged(lambda text: {"loud": number if text == "a dog" else 1.0})(["a cat", "a dog"])


def test_answers_have_the_same_names_in_any_order():
    answers = iter([{"a": 1, "b": False}, {"b": True, "a": 0.5}, {"a": 1}])
    judged = Judged(lambda text: next(answers))
    assert torch.equal(judged(["x", "y"]), torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
    assert judged.names == ("a", "b")
    with pytest.raises(ValueError, match="and the same names as before: 'a', 'b'"):
        judged(["z"])
