"""Texts in chosen contexts: what `hf-causal-context generate-text` does.

Shapes: B contexts, P tokens of the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapter.intervene import intervene
from ..bases.tokens import Tokenization, filler, known_positions, room_after
from ..contexts import Context
from ..errors import UserValueError

Prompt = str | Sequence[Mapping[str, str]]


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    contexts: Sequence[Context],
    *,
    max_new_tokens: int,
    seed: int | None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> list[list[str]]:
    """Return what the model writes after each prompt in each context, without the prompt: one list of texts per prompt.

    The contexts of a prompt are one batch, so nothing is padded. Its draws depend on the seed, on the prompt and on
    which contexts there are; the random state of the caller stays as it was.

    Args:
        model: with a causal context adapter.
        tokenizer: its tokenizer.
        prompts: texts, or lists of messages for the tokenizer's chat template.
        contexts: () is the observational one.
        max_new_tokens: length of the texts.
        seed: of the draws; None takes the likeliest token each time.
        temperature: of the draws; None leaves the model's own setting, as does None for the next.
        top_p: share of the probability that is drawn from.

    Raises:
        ValueError: for a prompt without tokens, one that leaves too little room, unknown concepts, or numbers out of
            range.
    """
    if max_new_tokens < 1:
        raise UserValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if temperature is not None and not temperature > 0:
        raise UserValueError(
            f"temperature={temperature} must be positive. For the likeliest tokens give seed=None, or --greedy."
        )
    if top_p is not None and not 0 <= top_p <= 1:
        raise UserValueError(f"top_p={top_p} must be from 0 to 1.")
    encoder_decoder = bool(cast(Any, model).config.is_encoder_decoder)
    column = "prompt" if encoder_decoder else "text"
    tokenize = Tokenization(tokenizer, column, encoder_decoder=encoder_decoder, max_length=sys.maxsize)
    prompt_ids = [tokenize.beginning(prompt) for prompt in prompts]
    for ids in prompt_ids:
        _check_room(model, ids, max_new_tokens, encoder_decoder)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": seed is not None}
    options |= {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
    # What follows the end of shorter texts; nothing is padded before.
    filling = filler(tokenizer)
    results = []
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        intervene(model, contexts),
    ):
        for ids in prompt_ids:
            batch = torch.tensor([ids] * len(contexts), device=model.device)
            if seed is not None:
                torch.manual_seed(seed)
            output = cast(Any, model).generate(
                input_ids=batch, attention_mask=torch.ones_like(batch), pad_token_id=filling, **options
            )
            written = output if encoder_decoder else output[:, len(ids) :]
            results.append(tokenizer.batch_decode(written, skip_special_tokens=True))
    return results


def _check_room(model: PreTrainedModel | PeftModel, ids: Sequence[int], new: int, encoder_decoder: bool) -> None:
    known = known_positions(model)
    if known is None:
        return
    if encoder_decoder and len(ids) > known:
        raise UserValueError(f"The prompt has {len(ids)} tokens, and the model reads {known}. Shorten it.")
    room = room_after(model, ids)
    if room < 1:
        raise UserValueError(f"The prompt has {len(ids)} tokens, and the model knows {known} positions. Shorten it.")
    if new > room:
        raise UserValueError(
            f"The model knows {known} positions, and the prompt has {len(ids)} tokens, so max_new_tokens={new} is too "
            f"much. Give at most {room}."
        )
