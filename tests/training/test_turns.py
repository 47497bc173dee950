"""Conversations: which turns are learned, and the tools that the assistant may call."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Json, List, Value

from hf_causal_context.bases.chats import render_chat
from hf_causal_context.bases.tokens import IGNORED, Tokenization
from hf_causal_context.data import check_data, load_text_folders, texts_from_dataset
from hf_causal_context.data.text_rows import prompt_of
from hf_causal_context.training.language.fine_tune import _example_inputs

from .small_language import CHAT, text_data, word_tokenizer

CAT = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat"}]
DOG = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "ran on"}]
TOOLS = [{"type": "function", "function": {"name": "barked", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "barked", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "loudly", "name": "barked"}
TOOL_CHAT = (
    "{% if tools %}on {% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}{% for m in messages %}"
    "{{ m.role }} : {{ m.content }}{% for c in m.tool_calls or [] %}yo {{ c.function.name }} {% endfor %} "
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def tool_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TOOL_CHAT
    return tokenizer


def learned(row, tokenizer):
    return tokenizer.decode(row.labels[row.labels != IGNORED])


def test_all_turns_of_the_assistant_are_learned_and_nothing_else():
    tokenizer = word_tokenizer(bos=True)
    every = Tokenization(tokenizer, "messages")({"messages": CAT + DOG})
    row = Tokenization(tokenizer, "messages", assistant_only=True)({"messages": CAT + DOG})
    assert np.array_equal(row.ids, every.ids)
    assert learned(row, tokenizer) == "sat </s> ran on </s>"
    assert (row.labels[row.labels != IGNORED] == row.ids[row.labels != IGNORED]).all()
    last = Tokenization(tokenizer, "messages", completion_only=True)({"messages": CAT})
    alone = Tokenization(tokenizer, "messages", assistant_only=True)({"messages": CAT})
    assert np.array_equal(alone.labels, last.labels)
    cut = Tokenization(tokenizer, "messages", assistant_only=True, max_length=12)({"messages": CAT + DOG})
    assert (cut.cut, len(cut.ids), learned(cut, tokenizer)) == (True, 12, "sat </s>")


def test_a_system_message_may_be_of_parts():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[0].text }} {% endfor %}"
    parts = [{"role": "system", "content": [{"type": "text", "text": "good sir"}]}]
    assert render_chat(tokenizer, parts) == "good sir "


def test_turns_that_cannot_be_told_are_errors():
    tokenizer = word_tokenizer()
    for column, completion_only, received in (
        ("text", None, "The rows have 'text'. Leave one of them out"),
        ("prompt", None, "The rows have 'prompt'. Leave one of them out"),
        ("messages", True, "The rows have 'messages', and --completion_only_loss takes the last one only"),
    ):
        with pytest.raises(ValueError, match=received):
            Tokenization(tokenizer, column, completion_only=completion_only, assistant_only=True)
    with pytest.raises(ValueError, match="the assistant's messages, and the row has none. Roles: user, user. Add"):
        Tokenization(tokenizer, "messages", assistant_only=True)({"messages": [CAT[0], DOG[0]]})
    with pytest.raises(ValueError, match="within --max_length=4 tokens the row has nothing of them. Raise it"):
        Tokenization(tokenizer, "messages", assistant_only=True, max_length=4)({"messages": CAT})
    for options in ({"assistant_only": True}, {"completion_only": True}):
        with pytest.raises(ValueError, match="There is no message before the assistant's first one"):
            Tokenization(tokenizer, "messages", **options)({"messages": CAT[1:]})
    tokenizer.chat_template = CHAT.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else 'and' }}")
    with pytest.raises(ValueError, match="in another way when others follow.* Give --completion_only_loss"):
        Tokenization(tokenizer, "messages", assistant_only=True)({"messages": CAT + DOG})


def test_tools_are_read_and_calls_are_learned(tmp_path):
    tokenizer = tool_tokenizer()
    chat = [CAT[0], CALL | {"content": None}, RESULT, DOG[1]]
    row = {"messages": chat, "tools": TOOLS}
    tokens = Tokenization(tokenizer, "messages", assistant_only=True)(row)
    assert tokenizer.decode(tokens.ids) == (
        "on barked user : a cat </s> assistant : yo barked </s> <unk> : loudly </s> assistant : ran on </s>"
    )
    assert learned(tokens, tokenizer) == "yo barked </s> ran on </s>"
    cat = Tokenization(tokenizer, "messages")({"messages": CAT})
    as_text = Tokenization(tokenizer, "messages", assistant_only=True)(row | {"tools": json.dumps(TOOLS)})
    assert np.array_equal(as_text.ids, tokens.ids)
    prompt = prompt_of(row, "messages")
    assert prompt == {"messages": chat[:-1], "tools": TOOLS}
    begin = Tokenization(tokenizer, "messages").prompt_ids(prompt)
    assert begin == tokens.ids[: len(begin)].tolist()
    assert np.array_equal(Tokenization(tokenizer, "messages")({"messages": CAT, "tools": ""}).ids, cat.ids)
    with pytest.raises(ValueError, match=r"'tools' must be JSON schemas in a list; '\[barked' is no JSON"):
        Tokenization(tokenizer, "messages")({"messages": CAT, "tools": "[barked"})
    without = word_tokenizer()
    no_call = [CAT[0], CAT[1] | {"tool_calls": []}]
    assert np.array_equal(Tokenization(without, "messages")({"messages": no_call}).ids, cat.ids)
    with pytest.raises(ValueError, match="The chat template leaves 'tool_calls' out, so the model would read an"):
        Tokenization(without, "messages")({"messages": chat})
    with pytest.raises(ValueError, match="The chat template leaves tools out, so the model would not read them"):
        Tokenization(without, "messages")({"messages": CAT, "tools": TOOLS})


def test_files_and_datasets_with_tools(tmp_path):
    rows = [{"messages": [CAT[0], CALL, RESULT, DOG[1]], "tools": TOOLS}, {"messages": CAT, "tools": []}]
    for context in ("obs", "a"):
        (tmp_path / context).mkdir()
        lines = [json.dumps({**row, "id": 3}) + "\n" for row in rows]
        (tmp_path / context / "rows.jsonl").write_text("".join(lines))
    data = load_text_folders(tmp_path)
    assert [{**row, "context": ""} for row in data.rows.select(range(2))] == [{**row, "context": ""} for row in rows]
    features = Features({"messages": List(Json()), "tools": List(Json()), "context": Value("string")})
    table = [{**row, "context": context} for context in ("obs", "a") for row in rows]
    from_columns = texts_from_dataset(Dataset.from_list(table, features=features))
    assert list(from_columns.rows) == [row | {"context": ""} for row in table[:2]] + table[2:]
    # Columns of structures: datasets fill what a message lacks with None.
    structured = texts_from_dataset(Dataset.from_list(table))
    tokenize = Tokenization(tool_tokenizer(), "messages", assistant_only=True)
    expected = [tokenize(row) for row in data.rows]
    for given in (from_columns, structured):
        assert all(
            np.array_equal(tokenize(row).labels, other.labels) for row, other in zip(given.rows, expected, strict=True)
        )
    (tmp_path / "a" / "rows.jsonl").write_text(json.dumps({"messages": CAT, "tools": "barked"}))
    with pytest.raises(ValueError, match="'tools' must be a list of JSON schemas; received 'barked'"):
        load_text_folders(tmp_path)


def test_an_assistant_that_says_nothing_is_named():
    silent = [CAT[0], {"role": "assistant", "content": " "}]
    table = [{"messages": chat, "context": context} for context, chat in (("obs", CAT), ("a", silent))]
    (error,) = check_data(texts_from_dataset(Dataset.from_list(table))).errors
    assert "row 0 of 'a' (train) ('messages' is empty)" in error


def test_the_code_of_the_card_asks_chat_models_like_a_user():
    assert '"content": "Tell me a short story."' in _example_inputs(text_data("messages"), "")
    assert '"content": "a cat"' in _example_inputs(text_data("messages"), "a cat")
    assert _example_inputs(text_data("text"), "") == 'tokenizer("Once upon a time", return_tensors="pt")'
