"""How many cases a property is tried on, what arbitrary values are, and what counts as an error of this package."""

import traceback
from pathlib import Path

import peft
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import hf_causal_context

OURS = str(Path(hf_causal_context.__file__).parent)
PEFT = str(Path(peft.__file__).parent)
TEXTS = ("", " ", "a", "b", "a+b", "a=0.5", "+", "=", ",", "x" * 200, "\0", "\ud800", "\u202e", "\u3164")
UNREASONABLE = (
    *(None, True, False, 0, 1, -1, 2, 10**6, 10**30, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf")),
    *TEXTS,
    *(b"a", 1j),
    *([], [[]], {}, (), frozenset(), {"a": {}}, {1: 2}, ["a", None], object, range(3), {"a": 10**400}),
)


def cases(count):
    """The same `count` cases in every run, however long each takes."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
    )


def nested(depth):
    """A list inside a list, `depth` times."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


UNPRINTABLE = {
    "deep": nested(5_000),
    "huge": 10**5_000,
    "deep inside": {"a": nested(5_000)},
    "huge inside": {"a": 10**5_000},
}


def plain_values():
    """What JSON or Python may put where something else is expected."""
    scalars = st.one_of(st.sampled_from(UNREASONABLE), st.sampled_from(UNREASONABLE), st.integers(), st.floats())
    return st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3)
        ),
        max_leaves=4,
    )


def outcome(call, *arguments, errors=(ValueError, TypeError), raised_in=OURS, **keywords):
    """What a call returns, or the error that it raises; that must come from a `raise` of a package, with a text.

    Python's own errors ("'int' object is not iterable") have the right types, too, but help nobody.
    """
    try:
        return call(*arguments, **keywords)
    except errors as raised:
        error = raised
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename}:{last.lineno} {type(error).__name__}"
    assert last.filename.startswith(raised_in), where
    assert (last.line or "").startswith("raise"), where
    assert 20 < len(str(error)) < 6_000, where
    return error
