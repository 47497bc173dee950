"""Rows of texts: the shapes that TRL knows, what can be wrong with a row, and the files that hold them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Features, Json, LargeList, List, Value

from ..errors import UserValueError
from ..messages.wording import quoted

TEXT_SUFFIXES = frozenset({".txt", ".jsonl"})

# The columns of each shape; where a row has several, the first counts.
_SHAPES = (("messages",), ("prompt", "completion"), ("text",))
_TEXT = Value("string")
_MESSAGES = List(Json())  # beside role and content may be what calls tools
_KEPT = ("role", "content", "tool_calls", "tool_call_id", "reasoning_content")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_ALLOWED = {"text": "text", "messages": "a list of messages"}


@dataclass(frozen=True)
class TextFile:
    """A file of texts, and which of its lines are rows: those that are not blank, where they were not counted yet."""

    path: Path
    lines: Sequence[int] | None = None

    def names(self) -> Iterator[str]:
        """What messages call the rows."""
        lines = (number for number, _ in text_lines(self.path)) if self.lines is None else self.lines
        return (f"line {number} of {str(self.path)!r}" for number in lines)


def text_columns(names: Collection[str]) -> tuple[str, ...]:
    """Return the columns with the texts, among those of a row or a dataset; none if there is no complete shape."""
    return next((columns for columns in _SHAPES if set(columns) <= set(names)), ())


def columns_of(content_column: str) -> tuple[str, ...]:
    """All columns with texts, given the first; none if it is no such column."""
    return next((columns for columns in _SHAPES if columns[0] == content_column), ())


def is_text(feature: object) -> bool:
    """Whether a column holds one text per row."""
    return isinstance(feature, Value) and "string" in feature.dtype


def holds_messages(feature: object) -> bool:
    """Whether a column holds a list of messages per row; only reading tells it of JSON."""
    if not isinstance(feature, List | LargeList):
        return False
    item = cast(object, feature.feature)
    return isinstance(item, Json) or (
        isinstance(item, Mapping) and all(is_text(item.get(key)) for key in ("role", "content"))
    )


def row_features(row: Mapping[str, Any]) -> Features:
    """Return the shape of a row that `read_texts` yields."""
    return Features({column: _TEXT if isinstance(value, str) else _MESSAGES for column, value in row.items()})


def row_problem(row: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a row of texts and nothing else, if anything. Only prompts may be empty text."""
    texts = {column: value for column, value in row.items() if column != "tools"}
    for column, value in texts.items():
        if problem := _problem(column, value):
            return f"{column!r} {problem}"
    if "tools" in row and not isinstance(row["tools"], list):
        return f"'tools' must be a list of JSON schemas; received {reprlib.repr(row['tools'])}"
    if len({isinstance(value, str) for value in texts.values()}) > 1:
        return "of 'prompt' and 'completion' one is text and the other a list of messages"
    return None


def _problem(column: str, value: object) -> str | None:
    if isinstance(value, str) and column != "messages":
        return None if value.strip() or column == "prompt" else "is empty"
    if not isinstance(value, list) or column == "text":
        return f"must be {_ALLOWED.get(column, 'text or a list of messages')}; received {reprlib.repr(value)}"
    for number, message in enumerate(value):
        known = message if isinstance(message, Mapping) else {}
        content = known.get("content") or ("" if known.get("tool_calls") else known.get("content"))
        if not (known.get("role") and isinstance(known["role"], str) and isinstance(content, str)):
            return f"has a message {number} without 'role' and 'content' as text: {reprlib.repr(message)}"
        if known["role"] not in _ROLES:
            role = reprlib.repr(known["role"])
            return f"has the role {role} in message {number}; allowed are {quoted(_ROLES)}"
    if not value:
        return "has no messages"
    answers = [message for message in value if column != "messages" or message["role"] == "assistant"] or value
    return None if column == "prompt" or any(map(_says_something, answers)) else "is empty"


def is_answered(row: Mapping[str, Any]) -> bool:
    """Whether the assistant says something in what is learned of a row; of texts that are no messages, always."""
    learned = row.get("messages", row.get("completion"))
    return not isinstance(learned, list) or any(message["role"] == "assistant" for message in learned)


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def read_texts(path: Path, unread: set[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a file: of .txt one text per line, of .jsonl one object; blank lines are skipped.

    What messages hold besides is not read; its keys go into the set `unread`.

    Raises:
        ValueError: for a line that is not UTF-8, not JSON, or has no text; it names file and line.
    """
    of_objects, keys = path.suffix.lower() == ".jsonl", set() if unread is None else unread
    for number, line in text_lines(path):
        try:
            row = _parse_object(line, keys) if of_objects else {"text": line}
        except ValueError as error:
            raise UserValueError(f"Line {number} of {str(path)!r}: {error}.") from None
        yield number, row


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines of a file that are not blank: its rows.

    Raises:
        ValueError: for a line that is not UTF-8, or of .txt one that other programs would show as several.
    """
    # Bytes, because text mode would also end lines where Unicode does.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserValueError(
                    f"Line {number} of {str(path)!r} is not UTF-8 ({error.reason}). Save the file as UTF-8."
                ) from None
            if "\r" in line and path.suffix.lower() == ".txt":  # as of old Macs, whose file would be a single text
                raise UserValueError(
                    f"Line {number} of {str(path)!r} holds a carriage return, which ends no line here. Save the file "
                    "with line feeds."
                )
            if line.strip():
                yield number, line


def told_unread(keys: Collection[str]) -> Iterator[str]:
    """Say which keys of messages are not read, if there are any."""
    if keys:
        known = f"{quoted(_KEPT)}, and 'name' of a tool"
        yield f"Of messages, {quoted(sorted(keys))} is not read, which chat templates do not know. Known are {known}."


def _parse_object(line: str, unread: set[str]) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:  # too many digits, too many brackets
        raise UserValueError(f"not JSON ({error}). Write one object per line") from None
    columns = text_columns(entry) if isinstance(entry, dict) else ()
    if not columns:
        raise UserValueError(
            'it must be {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}; received '
            f"{reprlib.repr(entry)}"
        )
    if "tools" in entry and isinstance(entry[columns[0]], list):
        columns = (*columns, "tools")
    if problem := row_problem({column: entry[column] for column in columns}):
        raise UserValueError(f"{problem}. Correct or remove the line")
    row = {column: entry[column] if column == "tools" else _plain(entry[column], unread) for column in columns}
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserValueError(
                f"half a character ({error.object[error.start]!a}). Correct or remove the line"
            ) from None
    return row


def _plain(value: Any, unread: set[str]) -> Any:
    if isinstance(value, str):
        return value
    for message in value:
        unread.update(message.keys() - {*_KEPT, *(["name"] if message["role"] == "tool" else [])})
    kept = [(*_KEPT, "name") if message["role"] == "tool" else _KEPT for message in value]
    return [{key: message[key] for key in keys if key in message} for keys, message in zip(kept, value, strict=True)]


def prompt_of(row: Mapping[str, Any], content_column: str, given: str = "") -> Any:
    """Return what a text of the row's shape follows: what is given, by default the row's own prompt, else nothing.

    It is text, messages, or where there are tools {"messages", "tools"}.
    """
    content = row[content_column]
    if not isinstance(content, list):
        return given or (content if content_column == "prompt" else "")
    if given:
        content = [{"role": "user", "content": given}]
    elif content_column == "messages" and content[-1]["role"] == "assistant":
        content = content[:-1]
    return {"messages": content, "tools": row["tools"]} if row.get("tools") else content
