"""Contexts, concepts and masks: what holds for all of them, and what arbitrary values end in."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_causal_context import ConceptSet, Context
from hf_causal_context._files import file_name
from hf_causal_context.contexts import as_context, as_contexts, context_text

from .cases import UNPRINTABLE, cases, outcome, plain_values

NAMES = st.one_of(
    st.text("abeE10-.'()é寿🙂\"", min_size=1, max_size=5),
    st.sampled_from(["e", "1e", "E5", "-", "a b", "nan", "inf", "obs", "()", "'", "1_0"]),
)
STRENGTHS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-3, 3), st.sampled_from([1e16, 1e-7, -1e22])
)
MAPPINGS = st.dictionaries(NAMES, STRENGTHS, max_size=4)
CONTEXTS = MAPPINGS.map(Context)


@cases(400)
@given(CONTEXTS)
def test_what_is_printed_is_read_back(context):
    assert Context.parse(str(context)) == context == as_context(context.strengths)
    assert hash(Context.parse(str(context))) == hash(context)
    assert pickle.loads(pickle.dumps(context)) == context
    assert Context.parse(f"  {str(context).replace('=', ' = ')} ") == context
    signed = (f"{name}={strength:+}" for name, strength in context.strengths.items())
    assert Context.parse("+".join(signed)) == context
    assert bool(context) == bool(context.targets) == bool(str(context))
    assert eval(repr(context).replace("Context(", "Context.parse(").replace("parse()", "parse('')")) == context


@cases(300)
@given(MAPPINGS, MAPPINGS, MAPPINGS, st.randoms(use_true_random=False))
def test_composition_is_a_union_that_knows_no_order(first, second, third, random):
    parts = [Context(first), Context(second), Context(third)]
    # Strength 0 is no intervention.
    merged = [(name, float(value)) for part in (first, second, third) for name, value in part.items() if value]
    if any(one != other for name, one in merged for same, other in merged if name == same):
        with pytest.raises(ValueError, match="has two strengths in one context"):
            parts[0] | parts[1] | parts[2]
        return
    whole = parts[0] | parts[1] | parts[2]
    assert whole.strengths == dict(merged)
    assert parts[0] | (parts[1] | parts[2]) == whole == whole | whole == whole | Context()
    random.shuffle(parts)
    again = parts[0] | parts[1] | parts[2]
    assert again == whole
    assert str(again) == str(whole)
    assert list(again.targets) == sorted(again.targets)


@cases(300)
@given(st.lists(NAMES, min_size=1, max_size=6, unique=True), st.data())
def test_masks_and_contexts_are_each_others_inverse(names, data):
    concepts = ConceptSet(tuple(names))
    chosen = st.dictionaries(st.sampled_from(names), STRENGTHS, max_size=4)
    contexts = tuple(Context(data.draw(chosen)) for _ in range(data.draw(st.integers(1, 4))))
    mask = concepts.mask(contexts)
    assert mask.shape == (len(contexts), len(names))
    assert torch.equal(concepts.check_mask(mask), mask)
    for context, row in zip(contexts, mask.tolist(), strict=True):
        values = [context.strengths.get(name, 0.0) for name in names]
        assert row == torch.tensor(values, dtype=torch.float32).tolist()
    assert torch.equal(concepts.mask(concepts.contexts(mask)), mask)
    order = data.draw(st.permutations(range(len(names))))
    permuted = ConceptSet(tuple(names[k] for k in order))
    assert torch.equal(permuted.mask(contexts), mask[:, order])


@cases(200)
@given(st.lists(NAMES, min_size=1, max_size=4), CONTEXTS)
def test_unknown_and_duplicate_names_are_refused(names, context):
    if len(set(names)) < len(names):
        with pytest.raises(ValueError, match="Duplicate concepts"):
            ConceptSet(tuple(names))
        return
    concepts = ConceptSet(tuple(names))
    assert [concepts.index(name) for name in names] == list(range(len(names)))
    if set(context.targets) - set(names):
        with pytest.raises(ValueError, match="Unknown concept .* in context .* Known concepts: "):
            concepts.mask([context])
    else:
        assert concepts.mask([context]).shape == (1, len(names))


@cases(400)
@given(st.text(st.sampled_from("ab+=,.-eE10 \t\n\u3000_é"), max_size=12))
def test_any_text_is_a_context_or_an_error(text):
    result = outcome(Context.parse, text)
    if isinstance(result, Context):
        assert Context.parse(str(result)) == result


@cases(400)
@given(plain_values())
def test_any_value_is_a_context_or_an_error(value):
    check_value(value)


@pytest.mark.parametrize("name", UNPRINTABLE)
def test_so_is_what_python_cannot_print(name):
    check_value(UNPRINTABLE[name])
    check_value([UNPRINTABLE[name]])


def check_value(value):
    for call in (as_context, as_contexts, Context, ConceptSet, lambda given: context_text(given, "obs")):
        result = outcome(call, value)
        if isinstance(result, Context):
            mask = outcome(ConceptSet(result.targets or ("a",)).mask, [result])
            assert torch.isfinite(mask).all()


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


@cases(300)
@given(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES), st.integers(1, 4), st.data())
def test_any_tensor_is_a_mask_or_an_error(shape, dtype, count, data):
    tensor = torch.zeros(shape, dtype=dtype, device=data.draw(st.sampled_from(["cpu", "cpu", "meta"])))
    bad = tensor.numel() > 0 and tensor.device.type == "cpu" and data.draw(st.booleans())
    if bad and dtype.is_floating_point:
        tensor.view(-1)[-1] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    result = outcome(ConceptSet(tuple("abcd"[:count])).check_mask, tensor)
    fits = len(shape) in (1, 2) and shape[-1] == count and shape[0] > 0
    assert isinstance(result, torch.Tensor) == (
        fits and dtype.is_floating_point and tensor.device.type == "cpu" and not bad
    )
    if isinstance(result, torch.Tensor):
        assert torch.equal(result, tensor.reshape(-1, count))


@cases(200)
@given(st.text(max_size=12))
def test_file_names_stay_in_their_folder(label):
    name = file_name(label)
    assert not set(name) & set("/\\\0:\n")
    assert not name.startswith(".")
