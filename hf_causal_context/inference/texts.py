"""Texts in chosen contexts: what `hf-causal-context generate-text` does.

Shapes: B texts at once, P tokens of the longest of their prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._random import seeded
from ..adapter.intervene import intervene
from ..bases.language import ONE_TEXT
from ..bases.tokens import Ids, Prompt, Tokenization, filler, known_positions, room_after
from ..contexts import Context
from ..errors import UserValueError


def generate_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    contexts: Sequence[Context],
    *,
    seed: int | None,
    **options: Any,
) -> list[list[str]]:
    """Return what the model writes after each prompt in each context, without the prompt: one list of texts per prompt.

    For several seeds, and for the arguments, see `texts_of_seeds`.
    """
    [texts] = texts_of_seeds(model, tokenizer, prompts, contexts, seeds=[seed], **options)
    return texts


@torch.no_grad()
def texts_of_seeds(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    contexts: Sequence[Context],
    *,
    max_new_tokens: int,
    seeds: Sequence[int | None],
    temperature: float | None = None,
    top_p: float | None = None,
    batch_size: int | None = None,
    with_prompt: bool = False,
) -> Iterator[list[list[str]]]:
    """Yield, for each seed, what the model writes after each prompt in each context: one list of texts per prompt.

    Prompts and contexts share batches; for models that read what fills up shorter prompts, prompts of one length do.
    The draws depend on the seed, on all prompts and contexts and on the batch size; the random state of the caller
    stays as it was.

    Args:
        model: with a causal context adapter.
        tokenizer: its tokenizer.
        prompts: texts, or messages for the tokenizer's chat template: a list, or {"messages", "tools"}.
        contexts: () is the observational one.
        max_new_tokens: length of the texts.
        seeds: of the draws; None takes the likeliest token each time.
        temperature: of the draws; None leaves the model's own setting, as does None for the next.
        top_p: share of the probability that is drawn from.
        batch_size: texts at once; None for all.
        with_prompt: give the texts of a causal model with their prompts, as the tokenizer writes both together.

    Raises:
        ValueError: for a prompt without tokens, one that leaves too little room, unknown concepts, or numbers out of
            range.
    """
    if max_new_tokens < 1:
        raise UserValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if batch_size is not None and batch_size < 1:
        raise UserValueError(f"batch_size={batch_size} must be at least 1.")
    check_draws(temperature, top_p)
    encoder_decoder = bool(cast(Any, model).config.is_encoder_decoder)
    prompt_ids = _prompt_ids(model, tokenizer, prompts, max_new_tokens)
    options: dict[str, Any] = {**ONE_TEXT, "max_new_tokens": max_new_tokens, "tokenizer": tokenizer}
    options |= {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
    # What follows the end of shorter texts, and what stands before shorter prompts.
    filling = filler(tokenizer)
    together = _ignores_padding(model, prompt_ids, filling, left=not encoder_decoder)
    batches = _batches([(ids, context) for ids in prompt_ids for context in contexts], batch_size, together)
    for seed in seeds:
        texts: list[str] = []
        with seeded(seed, model.device):
            for some in batches:
                batch, mask = padded_prompts([ids for ids, _ in some], filling, left=not encoder_decoder)
                with intervene(model, [context for _, context in some]):
                    output = cast(Any, model).generate(
                        input_ids=batch.to(model.device),
                        attention_mask=mask.to(model.device),
                        pad_token_id=filling,
                        do_sample=seed is not None,
                        **options,
                    )
                written = output if encoder_decoder or with_prompt else output[:, batch.shape[1] :]
                texts += tokenizer.batch_decode(written, skip_special_tokens=True)
        count = len(contexts)
        yield [texts[number * count : (number + 1) * count] for number in range(len(prompts))]


def check_draws(temperature: float | None, top_p: float | None) -> None:
    """Refuse settings of draws that mean nothing (ValueError)."""
    if temperature is not None and not temperature > 0:
        raise UserValueError(f"temperature={temperature} must be positive. For the likeliest tokens give seed=None.")
    if top_p is not None and not 0 <= top_p <= 1:
        raise UserValueError(f"top_p={top_p} must be from 0 to 1.")


def _prompt_ids(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], new: int
) -> list[list[int]]:
    """Return the tokens of each prompt; of several, an error says which it is about."""
    encoder_decoder = bool(cast(Any, model).config.is_encoder_decoder)
    column = "prompt" if encoder_decoder else "text"
    tokenize = Tokenization(tokenizer, column, encoder_decoder=encoder_decoder, max_length=sys.maxsize)
    found: list[list[int]] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = tokenize.beginning(prompt)
            _check_room(model, ids, new, encoder_decoder)
        except UserValueError as error:
            if len(prompts) == 1:
                raise
            raise UserValueError(f"Prompt {number} of {len(prompts)}: {error}") from error
        found.append(ids)
    return found


def _batches(
    rows: Sequence[tuple[list[int], Context]], batch_size: int | None, together: bool
) -> list[list[tuple[list[int], Context]]]:
    """Rows in batches, of prompts of one length unless others may stand `together` with them."""
    size = batch_size or max(1, len(rows))
    alike = [list(own) for _, own in groupby(rows, key=lambda row: 0 if together else len(row[0]))]
    return [own[start : start + size] for own in alike for start in range(0, len(own), size)]


def _ignores_padding(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], filling: int, left: bool
) -> bool:
    """Try out whether a prompt goes on as it does alone where it is filled up: some recurrent models see no mask."""
    short, long = min(prompts, key=len, default=()), max(prompts, key=len, default=())
    if len(short) == len(long):
        return True

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "stop_strings": None}
        options |= ONE_TEXT | {"return_dict_in_generate": True}
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        return cast(Any, model).generate(**inputs, pad_token_id=filling, **options).logits[0][0].float()

    ids, mask = padded_prompts([short, long], filling, left)
    with intervene(model, Context()):
        alone = logits(*padded_prompts([short], filling, left))
        padded, as_text = logits(ids, mask), logits(ids, torch.ones_like(mask))
    # What is left of the influence that the filling has without a mask: rounding.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((padded - alone).abs().max() <= tolerance * (as_text - alone).abs().max())


def padded_prompts(prompts: Sequence[Sequence[int] | Ids], value: int, left: bool) -> tuple[Tensor, Tensor]:
    """Tokens (B, P) and their mask; what is written goes on at the right, where a causal model reads the prompt."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), value)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return ids, mask


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
