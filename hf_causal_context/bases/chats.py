"""Conversations -> the text that a model reads, by its tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UserValueError

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
        ValueError: without a chat template, for messages that it refuses, or a system message that it leaves out.
    """
    if tokenizer.chat_template is None:
        raise UserValueError(
            "The rows are messages, but the tokenizer has no chat template. Take the model's instruction-tuned "
            "version, set tokenizer.chat_template, or write the rows as 'text' or as 'prompt' and 'completion'."
        )
    plain = [_without_none(message) for message in messages]
    tools = json.loads(tools) if isinstance(tools, str) else _without_none(tools or None)
    render = partial(_rendered, tokenizer, tools=tools)
    has_system = bool(plain) and plain[0]["role"] == "system"
    try:
        text = render(plain, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        if has_system and _takes(render, plain[1:]):
            raise UserValueError(f"The chat template refuses system messages: {error}. {_INTO_THE_FIRST}") from error
        raise UserValueError(f"The chat template refuses these messages: {error}") from error
    if has_system and plain[0].get("content", "").strip() not in text:
        raise UserValueError(
            f"The chat template leaves system messages out, so the model would not read them. {_INTO_THE_FIRST}"
        )
    if tools and text == render(plain, add_generation_prompt=add_generation_prompt, tools=None):
        raise UserValueError(
            "The chat template leaves tools out, so the model would not read them. Take a model that was made to call "
            "tools, or remove the column 'tools'."
        )
    return text


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], *, tools: Any, add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _without_none(value: Any) -> Any:
    """Return a value without the entries that datasets add to make rows alike."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list | tuple) else value


def _takes(render: Callable[..., str], messages: list[dict[str, Any]]) -> bool:
    try:
        render(messages, add_generation_prompt=False)
    except TemplateError:
        return False
    return True
