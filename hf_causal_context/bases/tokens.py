"""Text rows -> token ids and labels.

Rows have a "text", "messages", or a "prompt" with its "completion" (both text, or both messages); beside messages may
be "tools".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserValueError
from ..messages.wording import quoted
from .chats import render_chat
from .language import num_embeddings

IGNORED = -100
DEFAULT_MAX_LENGTH = 1024
# Under these names configurations hold the number of positions that a model knows.
_MAXIMA = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_SHAPES = ("text", "messages", "prompt")

Ids = NDArray[np.int32]
# What a text follows: text, messages, or {"messages", "tools"}.
Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]


@dataclass(frozen=True)
class TokenRow:
    """One row for a model.

    `ids` (T,): the input, of an encoder-decoder that of the encoder. `labels` (T,), or (L,) for a decoder: the ids to
    learn, -100 where nothing is learned. `lengths`: those of the texts in the row. `cut`: whether tokens were left out.
    """

    ids: Ids
    labels: Ids
    lengths: tuple[int, ...]
    cut: bool = False


class Tokenization:
    """How rows become tokens for one model.

    A causal model's text ends with the end-of-sequence token, unless it is cut on the right; conversations end as their
    chat template says. An encoder-decoder reads the prompt and learns the completion.

    Args:
        tokenizer: the model's.
        content_column: "text", "messages" or "prompt".
        encoder_decoder: whether the model is one.
        max_length: tokens per row, of an encoder-decoder on each side.
        completion_only: learn completions only, of messages the last one; None: where there are prompts.
        assistant_only: learn all messages of the assistant, and nothing else.

    Raises:
        ValueError: for rows that such a model cannot learn from.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        content_column: str,
        *,
        encoder_decoder: bool = False,
        max_length: int = DEFAULT_MAX_LENGTH,
        completion_only: bool | None = None,
        assistant_only: bool = False,
    ) -> None:
        if content_column not in _SHAPES:
            raise UserValueError(
                f"Rows of the column {content_column!r} are no texts. Needed are rows with 'text', 'messages', or "
                "'prompt' and 'completion'."
            )
        if encoder_decoder and content_column != "prompt":
            raise UserValueError(
                f"An encoder-decoder reads a prompt and learns its completion, but the rows have {content_column!r}. "
                "Give them the columns 'prompt' and 'completion', or take a causal model."
            )
        if encoder_decoder and completion_only is False:
            raise UserValueError(
                "--completion_only_loss=False: an encoder-decoder learns completions only. Leave it out, or take a "
                "causal model."
            )
        check_learned(content_column, completion_only, assistant_only)
        self.tokenizer, self.content_column, self.max_length = tokenizer, content_column, max_length
        self.encoder_decoder = encoder_decoder
        self.completion_only = content_column == "prompt" if completion_only is None else completion_only
        self.assistant_only = assistant_only

    @property
    def learned(self) -> str:
        """What of the rows is learned, in words."""
        if self.assistant_only:
            return "the assistant's turns"
        if self.encoder_decoder or self.completion_only:
            return "the last messages" if self.content_column == "messages" else "the completions"
        return "all of their tokens"

    def __call__(self, row: Mapping[str, Any]) -> TokenRow:
        """Return the tokens of a row.

        Raises:
            ValueError: for a row of which nothing is left to learn, or one that is not as described above.
        """
        tools = row.get("tools")
        prompt, completion = self._ids(*self._parts(row), tools)
        if self.encoder_decoder:
            if not prompt or not completion:
                raise UserValueError(f"The {'completion' if prompt else 'prompt'} has no tokens. Remove the row.")
            ids, labels = self._cut(prompt), completion[: self.max_length]
            cut = len(ids) + len(labels) < len(prompt) + len(completion)
            return TokenRow(np.array(ids, np.int32), np.array(labels, np.int32), (len(ids),), cut)
        if prompt and len(prompt) >= self.max_length:
            raise UserValueError(
                f"The prompt has {len(prompt)} tokens of --max_length={self.max_length}, which leaves no room for the "
                "completion. Raise it, or shorten the prompt."
            )
        ids = np.array((prompt + completion)[: self.max_length], np.int32)
        labels = ids
        if self.completion_only:
            labels = ids.copy()
            labels[: len(prompt)] = IGNORED
        if self.assistant_only:
            labels = np.where(self._by_assistant(row["messages"], tools, ids.tolist()), ids, IGNORED)
        if not (labels[1:] != IGNORED).any():
            self._check_answered(row)
            raise UserValueError(
                f"There is nothing to learn: {len(prompt)} tokens of prompt, {len(completion)} of text. The first "
                "token of a row has nothing before it. Remove the row."
            )
        return TokenRow(ids, labels, (len(ids),), cut=len(ids) < len(prompt) + len(completion))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the tokens that a completion follows, as in training.

        Unless one token holds the end of the prompt and the beginning of the completion: then that one is learned.
        """
        if isinstance(prompt, str):
            ids = self._tokens(prompt)
            if self.encoder_decoder:
                return self._cut(ids)
            if self._ends(ids) and not prompt.endswith(str(self.tokenizer.eos_token)):
                del ids[-1]  # of tokenizers that end every text
            return ids
        messages, tools = (prompt["messages"], prompt["tools"]) if isinstance(prompt, Mapping) else (prompt, None)
        text = render_chat(self.tokenizer, messages, tools=tools, add_generation_prompt=True)
        return self._tokens(text, add_special_tokens=False)

    def beginning(self, prompt: Prompt) -> list[int]:
        """Return the tokens that a text begins with: of an empty prompt the beginning- or end-of-sequence token.

        Raises:
            ValueError: where there is neither.
        """
        ids = self.prompt_ids(prompt)
        first = [n for n in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if n is not None][:1]
        if not ids and not first:
            raise UserValueError(
                "The prompt is empty, and the tokenizer has no beginning- or end-of-sequence token to begin with. Give "
                "a --prompt (for the samples of train-text a --validation_prompt): the first words of the text."
            )
        return ids or cast(list[int], first)

    def _ids(self, prompt: Any, completion: Any, tools: Any) -> tuple[list[int], list[int]]:
        chat = partial(render_chat, self.tokenizer, tools=tools)
        if isinstance(completion, str):
            if self.encoder_decoder:
                answer = self.tokenizer(text_target=completion)["input_ids"]
                return self._tokens(prompt), self._ended(list(answer))
            if prompt is None:
                return [], self._ended(self._tokens(completion))
            return self._split(self.prompt_ids(prompt), prompt, completion, add_special_tokens=True)
        if prompt is None:
            return [], self._tokens(chat(completion), add_special_tokens=False)
        begin, whole = chat(prompt, add_generation_prompt=True), chat([*prompt, *completion])
        if not whole.startswith(begin):
            raise UserValueError(
                "The chat template writes the prompt in another way when the completion follows, so what the model "
                "would see at inference is not what it learns. Use another template, or write the rows as text."
            )
        begin_ids = self._tokens(begin, add_special_tokens=False)
        return self._split(begin_ids, begin, whole.removeprefix(begin), add_special_tokens=False)

    def _split(
        self, prompt_ids: list[int], prompt: str, completion: str, add_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        """Return a prompt's tokens, and those that continue it; conversations end as their template says."""
        whole = self._tokens(prompt + completion, add_special_tokens=add_special_tokens)
        begin = _num_shared(prompt_ids, whole)
        answer = whole[begin:]
        if begin < len(prompt_ids):
            alone = self._tokens(completion, add_special_tokens=False)
            apart, unknown = prompt_ids + alone, cast(int, self.tokenizer.unk_token_id)
            # Some tokenizers put a space before any text; of others, words that run together are unknown.
            if self._text(apart) == self._text(whole) or apart.count(unknown) < whole.count(unknown):
                answer = alone
            else:
                prompt_ids = whole[:begin]
        return prompt_ids, self._ended(answer) if add_special_tokens else answer

    def _parts(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        """Prompt and completion; no prompt where all is learned alike."""
        if self.content_column == "text":
            return None, row["text"]
        if self.content_column == "prompt":
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str) != isinstance(completion, str):
                raise UserValueError("prompt and completion must both be text, or both be messages.")
            if self.encoder_decoder and not isinstance(prompt, str):
                raise UserValueError("An encoder-decoder takes prompt and completion as text, not as messages.")
            return prompt, completion
        messages = row["messages"]
        if not self.completion_only:
            return None, messages
        if not messages or messages[-1]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages)
            raise UserValueError(
                f"--completion_only_loss learns the last message, which must be the assistant's. Roles: {roles}."
            )
        return messages[:-1], messages[-1:]

    def _tokens(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(cast(list[int], self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]))

    def _text(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))

    def _by_assistant(self, messages: Sequence[Mapping[str, Any]], tools: Any, ids: list[int]) -> NDArray[np.bool_]:
        """Which tokens of a conversation are the assistant's, with what ends its turns (T,)."""
        chat = partial(render_chat, self.tokenizer, tools=tools)
        whole, written = chat(messages), np.zeros(len(ids), dtype=bool)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                begin, end = chat(messages[:number], add_generation_prompt=True), chat(messages[: number + 1])
                if not (whole.startswith(begin) and whole.startswith(end)):
                    raise UserValueError(
                        "The chat template writes a turn of the assistant in another way when others follow, so "
                        "--assistant_only_loss would learn what the model never writes. Give --completion_only_loss, "
                        "which learns the last turn."
                    )
                first, after = (_num_shared(self._tokens(text, False), ids) for text in (begin, end))
                written[first:after] = True
        return written

    def _check_answered(self, row: Mapping[str, Any]) -> None:
        """Say why nothing of a row is the assistant's, where only that is learned (ValueError)."""
        if not self.assistant_only:
            return
        roles = [message["role"] for message in row["messages"]]
        if "assistant" not in roles:
            raise UserValueError(
                "--assistant_only_loss learns the assistant's messages, and the row has none. Roles: "
                f"{', '.join(roles)}. Add the answer, or remove the row."
            )
        raise UserValueError(
            f"--assistant_only_loss learns the assistant's messages, and within --max_length={self.max_length} tokens "
            "the row has nothing of them. Raise it, or remove the row."
        )

    def _cut(self, ids: list[int]) -> list[int]:
        """Return the first tokens of what an encoder reads; if it ends with the end of the sequence, it still does."""
        if len(ids) <= self.max_length:
            return ids
        return [*ids[: self.max_length - 1], ids[-1]] if self._ends(ids) else ids[: self.max_length]

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or self._ends(ids) else [*ids, cast(int, eos)]

    def _ends(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] == self.tokenizer.eos_token_id


def check_learned(content_column: str, completion_only: bool | None, assistant_only: bool) -> None:
    """Refuse to learn parts of rows that these do not have, before a model is loaded (ValueError)."""
    if completion_only and content_column == "text":
        raise UserValueError(
            "--completion_only_loss: the rows have 'text', without completions. Give them 'prompt' and "
            "'completion', or 'messages', or leave it out."
        )
    if assistant_only and (content_column != "messages" or completion_only):
        also = ", and --completion_only_loss takes the last one only" if completion_only else ""
        raise UserValueError(
            f"--assistant_only_loss learns the assistant's turns of 'messages'. The rows have {content_column!r}"
            f"{also}. Leave one of them out."
        )


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel, pad_token: str | None
) -> None:
    """Give the tokenizer the padding token that was asked for, and check that it fits the model.

    Raises:
        ValueError: for an unknown padding token, or more tokens than the model has.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserValueError(
                f"--pad_token={pad_token!r} is not in the tokenizer's vocabulary. Its special tokens: "
                f"{quoted(tokenizer.all_special_tokens)}. Name one of its tokens."
            )
        tokenizer.pad_token = pad_token
    if len(tokenizer) > (num := num_embeddings(model)):
        raise UserValueError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's embeddings {num}. Take the tokenizer that belongs "
            "to the model."
        )


def filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills rows up: any does where the tokenizer has no padding token, since it is masked."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((cast(int, each) for each in ids if each is not None), 0)


def known_positions(model: PreTrainedModel | PeftModel) -> int | None:
    """How many tokens a row of this model may have; None where it does not say or does not mind."""
    config = cast(Any, model).config.get_text_config()
    if hasattr(config, "relative_attention_num_buckets"):  # T5: no position is too far away
        return None
    found = (getattr(config, name, None) for name in _MAXIMA)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def room_after(model: PreTrainedModel | PeftModel, prompt: Sequence[int]) -> float:
    """How many tokens may follow a prompt; infinite for a model that does not mind, or does not say."""
    positions = known_positions(model)
    if positions is None:
        return math.inf
    return positions - (0 if cast(Any, model).config.is_encoder_decoder else len(prompt))


def row_length(model: PreTrainedModel, max_length: int | None) -> int:
    """Tokens per row: what was asked for, or the default within what the model allows.

    Raises:
        ValueError: for more than the model allows.
    """
    maximum = known_positions(model)
    if max_length is not None and maximum is not None and max_length > maximum:
        raise UserValueError(
            f"--max_length={max_length}, but {type(model).__name__} knows {maximum} positions. Lower it."
        )
    return max_length or min(DEFAULT_MAX_LENGTH, maximum or DEFAULT_MAX_LENGTH)
