"""What a language model writes by itself, as rows to learn or to measure.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from ...bases.language import ONE_TEXT
from ...bases.tokens import IGNORED, Ids, TokenRow
from ...inference.texts import padded_prompts

# Draws from the model's own distribution, whatever its generation_config.json prefers.
_PLAIN: dict[str, Any] = {
    **ONE_TEXT,
    "do_sample": True,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
_PLAIN |= dict.fromkeys(("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "guidance_scale"))
_PLAIN |= dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "min_new_tokens"))
_PLAIN |= dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "stop_strings"))


def continuations(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int] | Ids], room: Sequence[int], end: int | None
) -> list[Ids]:
    """Draw what the model writes after each prompt.

    Args:
        model: a causal model, or an encoder-decoder, which reads the prompts.
        prompts: their tokens, one or more each.
        room: how many tokens each may write at most.
        end: the token that ends a text; it is kept. So are others at which the model stops.
    """
    ids, mask = padded_prompts(prompts, 0, left=True)
    stops: Any = cast(Any, model).generation_config.eos_token_id
    ends = sorted({*(stops if isinstance(stops, list) else [stops]), end} - {None})
    output = cast(Any, model).generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(room),
        eos_token_id=ends or None,
        pad_token_id=0,
        **_PLAIN,
    )
    # A decoder's first token is no part of the text.
    begin = 1 if cast(Any, model).config.is_encoder_decoder else ids.shape[1]
    return [_until(row[:length], ends) for row, length in zip(output[:, begin:].cpu().numpy(), room, strict=True)]


def row_of(
    prompt: Sequence[int] | Ids, written: Sequence[int] | Ids, *, encoder_decoder: bool, learn_prompt: bool = False
) -> TokenRow:
    """Return the row of a text, of which what was written is learned, and by a causal model perhaps the prompt."""
    if encoder_decoder:
        return TokenRow(np.array(prompt, np.int32), np.array(written, np.int32), (len(prompt),))
    ids = np.array([*prompt, *written], np.int32)
    labels = ids.copy()
    if not learn_prompt:
        labels[: len(prompt)] = IGNORED
    return TokenRow(ids, labels, (len(ids),))


def _until(text: Ids, ends: Sequence[int]) -> Ids:
    """Return the tokens up to the first of those that end a text: what follows only fills up."""
    found = np.flatnonzero(np.isin(text, ends))
    return (text[: found[0] + 1] if len(found) else text).astype(np.int32)
