"""Tables of contexts in any form, and damaged metadata: nothing is lost, and what is wrong is said."""

import json
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_causal_context import Context
from hf_causal_context.contexts import as_context
from hf_causal_context.data import from_dataset, load_folders
from hf_causal_context.data.sampling import ContextSampler
from hf_causal_context.data.text_rows import read_texts
from tests.data.small import write_image

from .cases import cases, outcome

NAMES = ("a", "b", "c")
CHOSEN = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 1.0, 0.5, -2.0]), max_size=3)
FORMS = {
    "text": lambda context: str(context) or "obs",
    "list": lambda context: list(context.targets),
    "mapping": lambda context: {name: context.strengths.get(name) for name in NAMES},
}


@cases(250)
@given(st.lists(CHOSEN, min_size=1, max_size=12), st.sampled_from(sorted(FORMS)), st.booleans(), st.data())
def test_no_row_of_a_table_is_lost(rows, form, name_concepts, data):
    contexts = [Context(dict.fromkeys(row, 1.0) if form == "list" else row) for row in rows]
    table = Dataset.from_dict(
        {"image": list(range(len(rows))), "regime": [FORMS[form](context) for context in contexts]}
    )
    expected = Counter(map(str, contexts))
    held_out = data.draw(st.lists(st.sampled_from(sorted(expected)), max_size=2, unique=True))
    result = outcome(
        from_dataset,
        table,
        context_column="regime",
        concepts=NAMES if name_concepts else None,
        held_out_contexts=held_out,
    )
    singles = {context for context in expected if len(Context.parse(context).targets) == 1}
    known = set(NAMES) if name_concepts else {Context.parse(context).targets[0] for context in singles}
    trained = {context for context in expected if len(Context.parse(context).targets) < 2} - set(held_out)
    fits = bool(known) and bool(trained) and all(known.issuperset(context.targets) for context in contexts)
    assert isinstance(result, Exception) != fits, result
    if not fits:
        return
    assert result.counts == {context: expected[context] for context in trained}
    assert {context: len(rows) for context, rows in result.held_out.items()} == {
        context: expected[context] for context in set(expected) - trained
    }
    kept = [(row["image"], row["context"]) for part in (result.rows, *result.held_out.values()) for row in part]
    assert sorted(kept) == [(number, str(context)) for number, context in enumerate(contexts)]


TEXTS = [
    "a",
    "obs",
    "",
    "b+a",
    "+",
    "a=",
    "a=x",
    "a=nan",
    "=1",
    "a,b",
    " ",
    "a\x00",
    "\u3164",
    "x" * 200,
    "d",
    "a=1e999",
]
BAD_COLUMNS = (
    st.lists(st.one_of(st.none(), st.sampled_from(TEXTS)), min_size=1, max_size=4),
    st.lists(st.one_of(st.none(), st.lists(st.sampled_from(TEXTS), max_size=2)), min_size=1, max_size=4),
    st.lists(st.lists(st.lists(st.sampled_from(["a", "b"]), max_size=1), max_size=2), min_size=1, max_size=3),
    st.lists(st.fixed_dictionaries({"a": st.one_of(st.none(), st.floats())}), min_size=1, max_size=4),
    st.lists(st.fixed_dictionaries({"a+b": st.floats(-1, 1), "": st.none()}), min_size=1, max_size=4),
    st.lists(st.one_of(st.none(), st.integers(-9, 9)), min_size=1, max_size=4),
    st.lists(st.one_of(st.none(), st.booleans()), min_size=1, max_size=4),
    st.lists(st.binary(max_size=2), min_size=1, max_size=4),
)


@cases(350)
@given(st.one_of(BAD_COLUMNS), st.booleans(), st.booleans())
def test_any_column_of_contexts_is_read_or_refused(column, streaming, name_concepts):
    table = Dataset.from_dict({"image": list(range(len(column))), "context": column})
    rows = table.to_iterable_dataset() if streaming else table
    result = outcome(from_dataset, rows, concepts=["a", "b"] if name_concepts else None)
    if streaming and not isinstance(result, Exception):
        result = outcome(lambda: Counter(row["context"] for row in result.rows))  # read, and refused, in passing
    elif not isinstance(result, Exception):
        held_out = sum(len(rows) for rows in result.held_out.values())
        assert sum(result.counts.values()) + held_out == len(column)
        for context in (*result.contexts, *result.held_out):
            assert str(as_context(context)) == context


@cases(150)
@given(
    st.lists(st.sampled_from(["", "a", "b", "a+b"]), min_size=1, max_size=20),
    *(st.integers(1, 5), st.integers(0, 3), st.integers(1, 3), st.integers(0, 4)),
    st.dictionaries(st.sampled_from(["", "a", "b"]), st.floats(0.1, 4), max_size=2),
)
def test_processes_divide_the_same_balanced_rows(contexts, size, seed, processes, start, weights):
    weights = {name: weight for name, weight in weights.items() if name in contexts}
    whole = list(ContextSampler(contexts, size * processes, seed, 6, weights=weights))
    parts = [
        list(ContextSampler(contexts, size, seed, 6, start=start, rank=rank, world_size=processes, weights=weights))
        for rank in range(processes)
    ]
    assert [list(chain(*pieces)) for pieces in zip(*parts, strict=True)] == whole[start:]
    drawn = Counter(contexts[row] for batch in whole for row in batch)
    shares = {name: weights.get(name, 1.0) for name in set(contexts)}
    for name, share in shares.items():
        assert abs(drawn[name] - 6 * size * processes * share / sum(shares.values())) <= 1 + len(shares) / 2


LINES = [json.dumps({"file_name": f"{i}.png", "text": f"image {i}"}).encode() for i in range(3)]
MUTATIONS = (
    *(b"", b"\xff\xfe", b"[]", b"null", b"3", b'"text"', b"{", b"[" * 20_000, b"1" * 5_000, b"{}", b"\xef\xbb\xbf{}"),
    *(LINES[0], LINES[0][:20], LINES[1] + b"\r", b"  ", b"\x00", b"\xe2\x80\xa8", b"x" * 100_000),
    *(
        json.dumps({"file_name": name, "text": text}).encode()
        for name, text in (
            *(("../0.png", "a"), ("/etc/passwd", "a"), ("a/../../0.png", "a"), ("", "a"), (".", "a"), ("\0", "a")),
            *((0, "a"), (None, "a"), (["0.png"], "a"), ("0.png", 3), ("0.png", None), ("0.png", {}), ("0.png", "")),
            *(("9.png", "a"), ("./0.png", "a"), ("0.png", "\ud800"), ("\ud800.png", "a"), ("0.png", "a\u2028b")),
            *(("x" * 5_000, "a"), ("0.PNG", "a"), ("0.png/", "a")),
        )
    ),
)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    root = tmp_path_factory.mktemp("captioned")
    for folder in ("obs", "a"):
        for i in range(3):
            write_image(root / folder / f"{i}.png")
        (root / folder / "metadata.jsonl").write_bytes(b"\n".join(LINES))
    return root


@cases(350)
@given(st.data())
def test_damaged_metadata_is_read_or_refused(captioned, data):
    lines = list(LINES)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(lines)))
        kind = data.draw(st.sampled_from(["insert", "insert", "replace", "replace", "flip", "remove"]))
        if kind == "insert":
            lines.insert(place, data.draw(st.sampled_from(MUTATIONS)))
        elif place < len(lines) and kind == "replace":
            lines[place] = data.draw(st.sampled_from(MUTATIONS))
        elif place < len(lines) and kind == "remove":
            del lines[place]
        elif place < len(lines) and lines[place]:
            at = data.draw(st.integers(0, len(lines[place]) - 1))
            lines[place] = lines[place][:at] + data.draw(st.binary(min_size=1, max_size=1)) + lines[place][at + 1 :]
    (captioned / "a" / "metadata.jsonl").write_bytes(b"\n".join(lines))
    result = outcome(load_folders, captioned, errors=(ValueError, TypeError, FileNotFoundError))
    if not isinstance(result, Exception):
        assert len(result.rows["caption"][:]) == 6
        assert result.counts == {"": 3, "a": 3}


@cases(250)
@given(st.lists(st.one_of(st.sampled_from(MUTATIONS), st.binary(max_size=6)), min_size=1, max_size=4))
def test_damaged_texts_are_read_or_refused(lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "texts.jsonl")
        path.write_bytes(b"\n".join(lines))
        rows = outcome(lambda: list(read_texts(path)))
    if not isinstance(rows, Exception):
        assert all(row["text"].strip() for _, row in rows)
