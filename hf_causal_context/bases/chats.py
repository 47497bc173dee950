"""Conversations -> the text that a model reads, by its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UserValueError

_INTO_THE_FIRST = "Write what they say into the first message of the user."


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
) -> str:
    """Return a conversation as text.

    Args:
        tokenizer: the model's.
        messages: with "role" and "content".
        add_generation_prompt: end with what an answer of the assistant follows.

    Raises:
        ValueError: without a chat template, for messages that it refuses, or a system message that it leaves out.
    """
    if tokenizer.chat_template is None:
        raise UserValueError(
            "The rows are messages, but the tokenizer has no chat template. Take the model's instruction-tuned "
            "version, set tokenizer.chat_template, or write the rows as 'text' or as 'prompt' and 'completion'."
        )
    plain = [dict(message) for message in messages]
    has_system = bool(plain) and plain[0]["role"] == "system"
    try:
        text = _rendered(tokenizer, plain, add_generation_prompt)
    except TemplateError as error:
        if has_system and _takes(tokenizer, plain[1:]):
            raise UserValueError(f"The chat template refuses system messages: {error}. {_INTO_THE_FIRST}") from error
        raise UserValueError(f"The chat template refuses these messages: {error}") from error
    if has_system and plain[0]["content"].strip() not in text:
        raise UserValueError(
            f"The chat template leaves system messages out, so the model would not read them. {_INTO_THE_FIRST}"
        )
    return text


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _takes(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> bool:
    try:
        _rendered(tokenizer, messages, add_generation_prompt=False)
    except TemplateError:
        return False
    return True
