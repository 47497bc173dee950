"""Conversations -> the text that a model reads, by its tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UserValueError
from ..messages.wording import short_repr

_NOT_EVERYWHERE = ("system", "developer", "tool")  # roles that some templates pass over without a word
_INTO_THE_FIRST = "Write what they say into the first message of the user."


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Any = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return a conversation as text.

    Args:
        tokenizer: the model's.
        messages: with "role" and "content", and what else the template knows, such as "tool_calls".
        tools: JSON schemas of functions that the assistant may call, as a list or as text.
        add_generation_prompt: end with what an answer of the assistant follows.

    Raises:
        ValueError: without a chat template, or for messages that it refuses, or leaves out.
    """
    if tokenizer.chat_template is None:
        raise UserValueError(
            "The rows are messages, but the tokenizer has no chat template. Take the model's instruction-tuned "
            "version, set tokenizer.chat_template, or write the rows as 'text' or as 'prompt' and 'completion'."
        )
    if not messages:
        raise UserValueError(
            "There is no message before the assistant's first one, so it answers nothing. Begin with one of the user "
            "or the system."
        )
    plain = [_without_none(message) for message in messages]
    tools = _read_tools(tools) if isinstance(tools, str) else _without_none(tools or None)
    render = partial(_rendered, tokenizer, tools=tools)
    first = plain[0]["role"]
    instructs = first in ("system", "developer")
    try:
        text = render(plain, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        if instructs and plain[1:] and _rendered_if_taken(render, plain[1:]) is not None:
            raise UserValueError(f"The chat template refuses {first} messages: {error}. {_INTO_THE_FIRST}") from error
        raise UserValueError(f"The chat template refuses these messages: {error}") from error
    system = plain[0].get("content") if instructs else None
    if isinstance(system, str) and system.strip() not in text:
        raise UserValueError(
            f"The chat template leaves {first} messages out, so the model would not read them. {_INTO_THE_FIRST}"
        )
    for number, message in enumerate(plain[1:], 1):
        if message["role"] in _NOT_EVERYWHERE and message.get("content"):
            others = [*plain[:number], *plain[number + 1 :]]
            if text == _rendered_if_taken(render, others, add_generation_prompt):
                raise UserValueError(
                    f"The chat template leaves message {number} out, of the role {message['role']!r}, so the model "
                    "would not read it. Write what it says into a message of the user."
                )
    if tools and text == render(plain, add_generation_prompt=add_generation_prompt, tools=None):
        raise UserValueError(
            "The chat template leaves tools out, so the model would not read them. Take a model that was made to call "
            "tools, or remove the column 'tools'."
        )
    silent = [{key: each for key, each in message.items() if key != "tool_calls" or not each} for message in plain]
    if silent != plain and text == _rendered_if_taken(render, silent, add_generation_prompt):
        raise UserValueError(
            "The chat template leaves 'tool_calls' out, so the model would read an assistant that calls nothing. Take "
            "a model that was made to call tools, or write the calls into the content."
        )
    return text


def _read_tools(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise UserValueError(
            f"'tools' must be JSON schemas in a list; {short_repr(text)} is no JSON: {error}."
        ) from error


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], *, tools: Any, add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _without_none(value: Any) -> Any:
    """Return a value without the entries that datasets add to make rows alike."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list | tuple) else value


def _rendered_if_taken(
    render: Callable[..., str], messages: list[dict[str, Any]], add_generation_prompt: bool = False
) -> str | None:
    try:
        return render(messages, add_generation_prompt=add_generation_prompt)
    except TemplateError:
        return None
