"""Interventional texts: folders and datasets, map-style and streaming, and the checks of both."""

import pytest
from datasets import Dataset, Features, Json, List, Value

from hf_causal_context.data import (
    SELECTION_WARNING,
    check_data,
    load_text_folders,
    stream_batches,
    text_rows,
    texts_from_attributes,
    texts_from_dataset,
)
from tests.data.small import write_image
from tests.data.small_texts import COUNTS, SHAPES, assistant, rows_of, table, texts, user, write, write_text_folders

streamed = pytest.mark.parametrize("streaming", [False, True])
shaped = pytest.mark.parametrize("shape", SHAPES)

# Folders


@shaped
@streamed
def test_folders_are_contexts_and_combinations_are_held_out(tmp_path, shape, streaming):
    data = load_text_folders(write_text_folders(tmp_path, shape), streaming=streaming)

    assert data.concepts.names == ("happy", "long")
    assert data.contexts == ("", "happy", "long")
    assert data.counts == (None if streaming else {"": 4, "happy": 3, "long": 2})
    assert data.streaming is streaming
    assert data.content_column == ("prompt" if shape == "conversation" else shape)
    expected = {
        "" if context == "obs" else context: [
            {**SHAPES[shape](text), "context": "" if context == "obs" else context} for text in texts(context, count)
        ]
        for context, count in COUNTS.items()
    }
    assert rows_of(data) == expected
    assert data.rows.features == load_text_folders(tmp_path).rows.features


def test_files_of_a_folder(tmp_path):
    write(tmp_path / "obs" / "b.txt", "\ufeffone", "", "  two\u2028halves ", "   ")
    (tmp_path / "obs" / "windows.TXT").write_bytes(b"three\r\nfour")
    write(tmp_path / "obs" / "deep" / "a.jsonl", {"text": "five", "id": 3, "label": None}, "")
    write(tmp_path / "obs" / ".hidden" / "a.txt", "hidden")
    write(tmp_path / "obs" / ".hidden.txt", "hidden")
    write(tmp_path / "obs" / "notes.md", "other")
    write(tmp_path / "obs" / "metadata.jsonl", {"text": "of an image"})
    write(tmp_path / "rude" / "a.txt", "six")
    write(tmp_path / "readme.txt", "not a folder")

    data = load_text_folders(tmp_path)
    assert data.rows.filter(lambda row: not row["context"])["text"][:] == [
        *("one", "  two\u2028halves ", "five", "three", "four"),
    ]
    assert data.rows.column_names == ["text", "context"]
    assert data.counts == {"": 5, "rude": 1}


def test_names_of_folders(tmp_path):
    write_text_folders(tmp_path, "text", {"base": 2, "a": 1, "b": 1, "a-b": 1, "b=0.5": 1})
    data = load_text_folders(
        tmp_path,
        concepts=("b", "a"),
        observational_name="base",
        joint_separator="-",
        held_out_contexts=["b"],
        training_contexts=["base", "a", "a+b"],
    )
    assert data.concepts.names == ("b", "a")
    assert (data.contexts, sorted(data.held_out)) == (("", "a", "a+b"), ["b", "b=0.5"])
    assert rows_of(data)["b=0.5"] == [{"text": "b=0.5 ü 0", "context": "b=0.5"}]


@streamed
def test_a_stream_is_read_when_it_is_used(tmp_path, streaming):
    write_text_folders(tmp_path, "text")
    write(tmp_path / "long" / "rows.jsonl", {"text": "good"}, {"text": 3})
    if streaming:
        data = load_text_folders(tmp_path, streaming=True)
        assert next(iter(data.rows))["text"] == "happy ü 0"
    with pytest.raises(ValueError, match="Line 2 of .*long/rows.jsonl': 'text' must be text; received 3"):
        list(load_text_folders(tmp_path, streaming=streaming).rows)


def test_many_texts_are_read_piece_by_piece(tmp_path, monkeypatch):
    whole = load_text_folders(write_text_folders(tmp_path, "messages"))
    monkeypatch.setattr("hf_causal_context.data.texts._PIECE_ROWS", 2)
    assert rows_of(load_text_folders(tmp_path)) == rows_of(whole)


def test_streams_of_folders_make_batches(tmp_path):
    data = load_text_folders(write_text_folders(tmp_path, "prompt"), streaming=True)
    batches = stream_batches(data, batch_size=6, seed=0)
    seen = [row for _ in range(4) for row in next(batches)]
    assert {(row["context"], row["completion"]) for row in seen} == {
        (context, row["completion"])
        for context, rows in rows_of(data).items()
        if context in data.contexts
        for row in rows
    }


BAD_LINES = [
    ("{", "not JSON .* Write one object per line"),
    ("[]", r'must be {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": \[...\]}; received \[\]'),
    ({"body": "x"}, "received {'body': 'x'}"),
    ({"prompt": "x"}, "received {'prompt': 'x'}"),
    ({"text": None}, "'text' must be text; received None. Correct or remove the line"),
    ({"text": [user("x")]}, "'text' must be text; received"),
    ({"text": " \n"}, "'text' is empty. Correct or remove the line"),
    ({"prompt": "", "completion": ""}, "'completion' is empty"),
    ({"prompt": 3, "completion": "x"}, "'prompt' must be text or a list of messages; received 3"),
    ({"prompt": "x", "completion": [assistant("y")]}, "of 'prompt' and 'completion' one is text and the other a list"),
    ({"prompt": [], "completion": [assistant("y")]}, "'prompt' has no messages"),
    ({"messages": []}, "'messages' has no messages"),
    ({"messages": "x"}, "'messages' must be a list of messages; received 'x'"),
    ({"messages": ["x"]}, "'messages' has a message 0 without 'role' and 'content' as text: 'x'"),
    ({"messages": [user("x"), {"role": "user"}]}, "a message 1 without 'role' and 'content' as text: {'role': 'user'}"),
    ({"messages": [{"content": "x"}]}, "without 'role' and 'content'"),
    ({"messages": [{"role": "", "content": "x"}]}, "without 'role' and 'content'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "without 'role' and 'content' as text"),
    (
        {"messages": [user("x"), {"role": "bot", "content": "y"}]},
        "'messages' has the role 'bot' in message 1; allowed are",
    ),
    ({"prompt": [{"role": "usr", "content": "x"}], "completion": [assistant("y")]}, "'prompt' has the role 'usr' in"),
    ({"messages": [assistant(" ")]}, "'messages' is empty"),
    ('{"text": "a \\uD83D"}', r"half a character .'.ud83d'.. Correct or remove"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@streamed
def test_bad_lines_are_named(tmp_path, line, message, streaming):
    write(tmp_path / "obs" / "a.jsonl", "", line)
    with pytest.raises(ValueError, match=f"(?s)Line 2 of .*obs/a.jsonl'.*{message}"):
        load_text_folders(tmp_path, streaming=streaming)


@streamed
def test_lines_that_end_with_carriage_returns_alone_are_no_single_text(tmp_path, streaming):
    (tmp_path / "obs").mkdir()
    (tmp_path / "obs" / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    rows = load_text_folders(tmp_path, concepts=["a"], streaming=streaming).rows
    assert [row["text"] for row in rows] == ["one", "two"]
    (tmp_path / "obs" / "a.txt").write_bytes(b"one\rtwo\r")
    with pytest.raises(ValueError, match="Line 1 of .*obs/a.txt' holds a carriage return, .* Save the file with"):
        load_text_folders(tmp_path, concepts=["a"], streaming=streaming)


def test_prompts_may_be_empty_and_emoji_escaped(tmp_path):
    write(tmp_path / "obs" / "a.jsonl", '{"prompt": "", "completion": "\\ud83d\\ude00"}')
    write(tmp_path / "a" / "a.jsonl", {"prompt": "", "completion": "b"})
    rows = load_text_folders(tmp_path).rows
    assert rows.filter(lambda row: not row["context"])["completion"][:] == ["\U0001f600"]


@streamed
def test_messages_are_what_counts_and_other_keys_do_not(tmp_path, streaming):
    named = {"messages": [{**user("hi"), "name": "Ada"}, assistant("ho")], "text": "other", "prompt": 3}
    write(tmp_path / "obs" / "a.jsonl", named, {"messages": [user("hi"), {**assistant("hu"), "calls": [1]}]})
    write(tmp_path / "a" / "a.jsonl", {"messages": [user("hi"), assistant("hm")]})
    data = load_text_folders(tmp_path, streaming=streaming)
    assert rows_of(data)[""] == [{"messages": [user("hi"), assistant(reply)], "context": ""} for reply in ("ho", "hu")]


def test_files_that_are_not_utf8(tmp_path):
    (tmp_path / "obs").mkdir()
    (tmp_path / "obs" / "a.txt").write_bytes("gut\nschön".encode("latin-1"))
    with pytest.raises(ValueError, match="Line 2 of .*a.txt' is not UTF-8 .* Save the file as UTF-8"):
        load_text_folders(tmp_path, concepts=("a",))
    (tmp_path / "obs" / "a.txt").write_text("gut", "utf-16")
    with pytest.raises(ValueError, match="Line 1 of .*a.txt' is not UTF-8"):
        load_text_folders(tmp_path)


@streamed
def test_all_rows_have_one_shape(tmp_path, streaming):
    write_text_folders(tmp_path, "prompt")
    write(tmp_path / "happy" / "more.txt", "only text")
    with pytest.raises(
        ValueError,
        match=r"Line 1 of .*rows.jsonl' has 'prompt' and 'completion' \(text\), but .*happy/more.txt' has 'text' "
        r"\(text\). All rows must have one shape",
    ):
        load_text_folders(tmp_path, streaming=streaming)
    write(tmp_path / "happy" / "rows.jsonl", SHAPES["prompt"]("x"), SHAPES["conversation"]("x"))
    (tmp_path / "happy" / "more.txt").unlink()
    with pytest.raises(ValueError, match=r"Line 2 of .* has 'prompt' and 'completion' \(lists of messages\), but"):
        list(load_text_folders(tmp_path, streaming=streaming).rows)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder. Give the folder that holds one folder of texts per"):
        load_text_folders(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no folders. It must hold one folder of texts per context"):
        load_text_folders(tmp_path)
    write_image(tmp_path / "obs" / "0.png")
    write(tmp_path / "obs" / "metadata.jsonl", {"file_name": "0.png", "text": "a"})
    with pytest.raises(ValueError, match="obs' has no texts. Allowed are .txt, .* but not metadata.jsonl. Add texts"):
        load_text_folders(tmp_path)
    write(tmp_path / "obs" / "empty.txt", "", " ")
    with pytest.raises(ValueError, match="The file .*empty.txt' has no texts. Add some, or remove it"):
        load_text_folders(tmp_path)
    write_text_folders(tmp_path / "twice", "text", {"a+b": 1, "b+a": 1})
    with pytest.raises(ValueError, match="are the same context. Put their texts into one"):
        load_text_folders(tmp_path / "twice")
    write_text_folders(tmp_path / "named", "text")
    with pytest.raises(ValueError, match="held_out_contexts= names 'sad', which has no rows"):
        load_text_folders(tmp_path / "named", held_out_contexts=["sad"])


# Datasets


@shaped
@streamed
def test_a_dataset_has_the_rows_of_folders(tmp_path, shape, streaming):
    folders = load_text_folders(write_text_folders(tmp_path, shape))
    dataset = table(shape)
    data = texts_from_dataset(
        dataset.to_iterable_dataset() if streaming else dataset,
        concepts=("happy", "long"),
        held_out_contexts=["happy+long"],
    )
    assert rows_of(data) == rows_of(folders)
    assert (data.content_column, data.contexts) == (folders.content_column, folders.contexts)
    assert data.counts == (None if streaming else folders.counts)


@pytest.mark.parametrize("name", ["body", "caption", "prompt"])
@streamed
def test_columns_of_other_names(name, streaming):
    dataset = table("text", text=name, context="text")
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    data = texts_from_dataset(
        dataset, text_column=name, context_column="text", concepts=("happy", "long"), held_out_contexts=["happy+long"]
    )
    assert rows_of(data) == rows_of(texts_from_dataset(table("text")))
    assert data.content_column == "text"


def test_one_shape_and_one_column_of_texts():
    dataset = table("prompt").add_column("text", ["other"] * 11).add_column("body", texts("body", 11))
    assert texts_from_dataset(dataset).content_column == "prompt"
    with pytest.raises(
        ValueError, match="text_column='body' would have no effect, .* has 'prompt', 'completion', which"
    ):
        texts_from_dataset(dataset, text_column="body")
    data = texts_from_dataset(dataset.remove_columns("prompt"), text_column="body")
    assert data.rows["text"][:2] == texts("body", 2)


@streamed
def test_json_columns(streaming):
    """As `datasets` reads .jsonl files whose messages have different keys."""
    rows = [{"messages": [user("a")]}, {"messages": [user("b"), {"role": "tool", "content": None, "calls": [1]}]}]
    dataset = Dataset.from_list(
        [{**row, "context": context} for row, context in zip(rows, ("obs", "a"), strict=True)],
        features=Features({"messages": List(Json()), "context": Value("string")}),
    )
    data = texts_from_dataset(dataset.to_iterable_dataset() if streaming else dataset, concepts=("a",))
    assert next(iter(data.rows)) == {"messages": [user("a")], "context": ""}
    (error,) = check_data(data).errors
    assert error.startswith("1 texts are no training data: row 0 of 'a' (train) ('messages' has a message 1 without")


def test_dataset_errors():
    with pytest.raises(ValueError, match="no column 'body' .text_column=; or 'messages', or 'prompt' and 'completion'"):
        texts_from_dataset(table("text"), text_column="body")
    with pytest.raises(ValueError, match="no column 'text' .text_column="):
        texts_from_dataset(table("prompt").remove_columns("completion"))
    with pytest.raises(ValueError, match="no column 'do' .context_column="):
        texts_from_dataset(table("text"), context_column="do")
    numbers = Dataset.from_dict({"text": [1, 2], "context": ["obs", "a"]})
    with pytest.raises(ValueError, match="The column 'text' holds Value.'int64'.; it must hold one text per row. Name"):
        texts_from_dataset(numbers)
    with pytest.raises(ValueError, match="'prompt' holds .* and 'completion' holds .*; it must hold both one text per"):
        texts_from_dataset(table("text", text="completion").add_column("prompt", [1] * 11))
    with pytest.raises(ValueError, match="'messages' holds .*; it must hold a list of messages, each with 'role' and"):
        texts_from_dataset(table("text", text="messages"))
    parts = [[{"role": "user", "content": [{"type": "text", "text": "x"}]}]] * 2
    with pytest.raises(ValueError, match="it must hold a list of messages, each with 'role' and 'content'"):
        texts_from_dataset(Dataset.from_dict({"messages": parts, "context": ["obs", "a"]}))
    with pytest.raises(
        ValueError, match="'context' was named as content_column=, and a column 'context' is for contexts. Re"
    ):
        texts_from_dataset(table("text", context="do", text="context"), text_column="context", context_column="do")
    with pytest.raises(TypeError, match="dict is not a dataset"):
        texts_from_dataset({})


@streamed
def test_attributes_select_and_selecting_is_not_intervening(streaming):
    reviews = Dataset.from_dict({"review": ["good", "bad", "so so"], "sentiment": [1, 0, 0]})
    reviews = reviews.to_iterable_dataset() if streaming else reviews
    with pytest.warns(UserWarning, match="selecting is not intervening"):
        data = texts_from_attributes(reviews, {"positive": "sentiment == 1"}, text_column="review")
    assert [(row["text"], row["context"]) for row in data.rows] == [("good", "positive"), ("bad", ""), ("so so", "")]
    assert data.content_column == "text"
    assert data.warnings[0] == SELECTION_WARNING
    assert SELECTION_WARNING in check_data(data).warnings


# Checks


@shaped
@streamed
def test_checks_of_good_texts(tmp_path, shape, streaming):
    counts = {"obs": 60, "happy": 55, "long": 50, "happy+long": 3}
    report = check_data(load_text_folders(write_text_folders(tmp_path, shape, counts), streaming=streaming))
    assert report.errors == ()
    assert all(warning.startswith("Streaming:") for warning in report.warnings)
    assert [(row.context, row.role, row.count) for row in report.rows] == [
        *(("", "train", 60), ("happy", "train", 55), ("long", "train", 50), ("happy+long", "held out", 3)),
    ]


def test_a_few_short_texts_may_coincide():
    sets = {
        "": [f"text {i}" for i in range(60)],
        "a": [f"A {i}" for i in range(60)],
        "b": [f"B {i}" for i in range(60)],
    }
    sets["a+b"] = ["A 7", *(f"AB {i}" for i in range(99))]
    rows = [{"text": text, "context": context} for context, texts in sets.items() for text in texts]
    report = check_data(texts_from_dataset(Dataset.from_list(rows)))
    assert report.errors == ()
    assert report.warnings[-1].startswith(
        "1 held-out texts are also trained on: row 7 of 'a' (train) = row 0 of 'a+b' (held out)."
    )
    rows.append({"text": "B 7", "context": "a+b"})
    (error,) = check_data(texts_from_dataset(Dataset.from_list(rows))).errors
    assert error.startswith("2 held-out texts are also trained on")


@streamed
def test_whole_rows_are_compared(streaming):
    rows = [
        *(("Say.", "yes", "obs"), ("Say.", "no", "obs"), ("Say.", "no", "obs")),
        *(("Say.", "oh yes", "a"), ("Do.", "no", "a"), ("Say.", "no", "a"), ("Say.", "b", "b")),
        *(("Say.", "oh", "a+b"), ("Say.", "oh yes", "a+b")),
    ]
    dataset = Dataset.from_list([{"prompt": p, "completion": c, "context": context} for p, c, context in rows])
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    report = check_data(texts_from_dataset(dataset, concepts=("a", "b"), held_out_contexts=["a+b"]))
    (error,) = report.errors
    assert error.startswith("1 held-out texts are also trained on: row 0 of 'a' (train) = row 1 of 'a+b' ")
    (warning,) = [warning for warning in report.warnings if "two contexts" in warning]
    assert warning.startswith("1 texts are in two contexts: row 1 of the observational context (train)")


@streamed
def test_rows_of_files_are_named_by_their_lines(tmp_path, streaming):
    write(tmp_path / "obs" / "a.txt", "a", "", "b")
    write(tmp_path / "obs" / "b.txt", "\u00a0", "c")
    write(tmp_path / "formal" / "b.txt", "d", "  ", "c")
    report = check_data(load_text_folders(tmp_path, streaming=streaming))
    (warning,) = [warning for warning in report.warnings if "two contexts" in warning]
    formal, plain = (f"{str(tmp_path / folder / 'b.txt')!r}" for folder in ("formal", "obs"))
    assert f": line 3 of {formal} (formal) = line 2 of {plain} (observational). " in warning


@streamed
def test_chats_without_an_answer_are_named(tmp_path, streaming):
    instructed = [{"role": "developer", "content": "Be short."}, user("b"), assistant("c")]
    write(tmp_path / "obs" / "a.jsonl", {"messages": [user("a"), assistant("b")]}, {"messages": instructed})
    write(tmp_path / "a" / "a.jsonl", {"messages": [user("a"), assistant("c")]}, {"messages": [user("d")]})
    report = check_data(load_text_folders(tmp_path, streaming=streaming))
    (warning,) = [warning for warning in report.warnings if "assistant" in warning]
    assert f"1 texts have no message of the assistant: line 2 of {str(tmp_path / 'a' / 'a.jsonl')!r}. " in warning
    rows = [
        {"prompt": [user("a")], "completion": [who("b")], "context": c} for who, c in ((assistant, "obs"), (user, "a"))
    ]
    report = check_data(texts_from_dataset(Dataset.from_list(rows)))
    assert "1 texts have no message of the assistant: row 0 of 'a' (train). " in " ".join(report.warnings)


def test_an_unknown_role_in_a_dataset_is_an_error():
    rows = [
        {"messages": [user("a"), {"role": role, "content": "b"}], "context": c}
        for role, c in (("bot", "a"), ("tool", "obs"))
    ]
    (error,) = check_data(texts_from_dataset(Dataset.from_list(rows))).errors
    assert (
        "row 0 of 'a' (train) ('messages' has the role 'bot' in message 1; allowed are 'system', 'developer', 'user', "
        "'assistant', 'tool')"
    ) in error


@streamed
def test_empty_texts_and_missing_sets_are_errors(streaming):
    dataset = Dataset.from_dict({"text": ["x", " ", None], "context": ["a", "a", "a"]})
    report = check_data(texts_from_dataset(dataset.to_iterable_dataset() if streaming else dataset, concepts=("a",)))
    missing, unusable = report.errors
    assert "Add texts in which nothing was intervened on" in missing
    assert unusable == (
        "2 texts are no training data: row 1 of 'a' (train) ('text' is empty), row 2 of 'a' (train) ('text' must be "
        "text; received None). Correct or remove them."
    )


def test_keys_of_messages_that_are_not_read_are_named(tmp_path):
    chat = [{**user("a"), "weight": 1, "name": "me"}, {**assistant("b"), "reasoning_content": "c"}]
    for context in ("obs", "rude"):
        write(tmp_path / context / "a.jsonl", {"messages": [user("x"), assistant("y")]}, {"messages": chat})
    assert load_text_folders(tmp_path).warnings == (
        "Of messages, 'name', 'weight' is not read, which chat templates do not know. Known are 'role', 'content', "
        "'tool_calls', 'tool_call_id', 'reasoning_content', and 'name' of a tool.",
    )


def test_files_are_read_once_for_the_rows_and_what_is_wrong_with_them(tmp_path, monkeypatch):
    write(tmp_path / "obs" / "a.txt", "", "one", "", "one")
    write(tmp_path / "rude" / "b.txt", "two", "one")
    data = load_text_folders(tmp_path)
    monkeypatch.setattr(text_rows, "text_lines", lambda path: pytest.fail("read again"))
    (said,) = [warning for warning in check_data(data).warnings if "two contexts" in warning]
    assert f"line 2 of '{tmp_path / 'obs' / 'a.txt'}'" in said
    assert f"line 2 of '{tmp_path / 'rude' / 'b.txt'}'" in said
