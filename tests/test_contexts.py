"""Names <-> masks."""

import pickle

import pytest
import torch

from hf_causal_context import ConceptSet, Context
from hf_causal_context.contexts import as_context, as_contexts


def test_composition_commutes_and_is_idempotent():
    a, b = Context("thick"), Context({"slant": 0.5})
    assert a | b == b | a == Context("thick", {"slant": 0.5}) == (a | b | a)
    assert hash(a | b) == hash(b | a)
    assert str(a | b) == str(b | a) == "slant=0.5+thick"
    assert (a | b).targets == ("slant", "thick")


@pytest.mark.parametrize("text", ["", "thick", "slant+thick", "slant=-0.5+thick=1.5", "size=1e-07"])
def test_text_round_trip(text):
    assert str(Context.parse(text)) == text


def test_parse_accepts_commas_spaces_and_exponents():
    assert Context.parse("thick = 0.5, slant") == Context({"thick": 0.5, "slant": 1})
    assert Context.parse("thick=1e+1+slant") == Context({"thick": 10, "slant": 1})
    assert Context.parse("shape+size=0") == Context("shape")


def test_texts_call_the_empty_context_obs():
    assert Context.parse(" obs ") == as_context("obs") == Context()
    assert as_contexts(["obs", "thick"]) == (Context(), Context("thick"))
    concept = Context("obs")  # of data that calls the empty context otherwise
    assert str(concept) == "obs=1.0"
    assert Context.parse("obs=1") == Context.parse(str(concept)) == concept != Context()


@pytest.mark.parametrize(
    ("text", "message"),
    [("thick+", "Empty concept name in context 'thick\\+'"), ("thick=dark", "Strength 'dark' of concept 'thick'")],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Context.parse(text)


def test_conflicting_strengths():
    with pytest.raises(ValueError, match="'thick' has two strengths in one context: 1 and 0.5"):
        Context("thick") | Context({"thick": 0.5})


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", None])
def test_strengths_are_finite_numbers(strength):
    with pytest.raises(ValueError, match="of concept 'thick' must be a finite number"):
        Context({"thick": strength})


def test_contexts_are_immutable_and_pickle():
    context = Context({"thick": 0.5})
    with pytest.raises(AttributeError, match="immutable"):
        context.strengths = {}
    context.strengths["thick"] = 2
    assert context == Context({"thick": 0.5}) == pickle.loads(pickle.dumps(context))


def test_what_counts_as_one_context():
    expected = Context("thick", "slant")
    for value in (expected, "thick+slant", {"thick": 1, "slant": 1.0}, ("slant", "thick"), {"thick", "slant"}):
        assert as_context(value) == expected
        assert as_contexts(value) is None
    with pytest.raises(TypeError, match="3 of type int is not a context"):
        as_context(3)


def test_what_counts_as_one_per_sample():
    expected = (Context("thick"), Context(), Context({"slant": -0.5}))
    assert as_contexts([("thick",), (), {"slant": -0.5}]) == expected
    assert as_contexts((("thick",), (), {"slant": -0.5})) == expected
    assert as_contexts(["thick", "slant"]) == (Context("thick"), Context("slant"))
    with pytest.raises(ValueError, match="empty list of contexts"):
        as_contexts([])


def test_mask_round_trip():
    concepts = ConceptSet(("thick", "slant", "size"))
    contexts = (Context(), Context("slant"), Context({"size": -0.5, "thick": 2}))
    mask = concepts.mask(contexts)
    assert torch.equal(mask, torch.tensor([[0, 0, 0], [0, 1, 0], [2, 0, -0.5]]))
    assert concepts.contexts(mask) == contexts
    assert torch.equal(concepts.check_mask(mask[2]), mask[2:])


def test_unknown_concept_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"Unknown concept 'color' in context 'color\+size'. Known concepts: 'shape', 'size'. Correct the name",
    ):
        ConceptSet(("shape", "size")).mask([Context("color", "size")])


def test_concepts_written_beside_each_other_are_asked_for_a_plus():
    with pytest.raises(ValueError, match=r"Did you mean 'shape\+size'\? Correct"):
        ConceptSet(("shape", "size")).mask([Context.parse("shape size")])
    with pytest.raises(ValueError, match=r"Known concepts: 'shape', 'size'. Correct"):
        ConceptSet(("shape", "size")).mask([Context.parse("shape color")])


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ((), ValueError, "No concepts given"),
        ("thick", TypeError, "must be a sequence of names"),
        (("a", "b", "a"), ValueError, "Duplicate concepts: 'a'"),
        (("a", 3), TypeError, "Concept name 3 is of type int"),
        (("a", ""), ValueError, "must not be empty"),
        (("a", " b"), ValueError, "begin or end with white space"),
        (("a+b",), ValueError, "must not contain"),
        (("a=1",), ValueError, "must not contain"),
        (("a,b",), ValueError, "must not contain"),
        (("a\nb",), ValueError, "control characters"),
    ],
)
def test_concept_names(names, error, message):
    with pytest.raises(error, match=message):
        ConceptSet(names)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, r"shape \(2, 3\); it must be \(rows, 2\)"),
        (torch.zeros(2, 2, 2), ValueError, r"shape \(2, 2, 2\)"),
        (torch.zeros(0, 2), ValueError, r"shape \(0, 2\)"),
        (torch.zeros(2, 2, dtype=torch.long), TypeError, "dtype torch.int64; it must be floating point"),
        (torch.zeros(2, 2, dtype=torch.bool), TypeError, "dtype torch.bool"),
        (torch.tensor([[0.0, float("nan")]]), ValueError, "NaN or infinite"),
        (torch.zeros(2, 2, device="meta"), ValueError, "device 'meta'"),
    ],
)
def test_masks_are_checked(mask, error, message):
    with pytest.raises(error, match=message):
        ConceptSet(("a", "b")).check_mask(mask)


def test_accents_may_be_spelled_in_two_ways():
    """macOS writes names of folders with accents apart from their letters; what people type has them together."""
    apart, together = "cafe\u0301", "caf\u00e9"
    assert Context(apart) == Context.parse(together) == Context({apart: 1.0})
    assert str(Context(apart)) == together
    concepts = ConceptSet((apart, "hat"))
    assert concepts.names == (together, "hat")
    assert concepts.index(apart) == concepts.index(together) == 0
    assert apart in concepts
    with pytest.raises(ValueError, match="Duplicate concepts"):
        ConceptSet((apart, together))
