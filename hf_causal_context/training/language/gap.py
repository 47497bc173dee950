"""How far a language model is from the observational set: its perplexity there, and on texts of its own.

The bare base is measured. Its texts continue what each row does not learn: its prompt, or its first token.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..._random import seeded
from ...bases.gap import BaseGap
from ...bases.likelihoods import negative_log_likelihoods
from ...bases.token_batches import TextBatch
from ...bases.tokens import IGNORED, TokenRow
from ...inference.sampling import eval_mode
from ...messages.progress import ProgressBar
from ..bare_model import BareModel
from .own_texts import continuations, row_of

NUM_ROWS = 48
MOST_TOKENS = 64  # of a row that are looked at, and of an own text
_AT_ONCE = 16


@torch.no_grad()
def text_gap(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    collate: Callable[[Sequence[TokenRow], Tensor], TextBatch],
    end: int | None,
    seed: int,
) -> BaseGap:
    """Compare a base's perplexities on observational rows and on as many own texts; the random state stays as it was.

    It takes at most `MOST_TOKENS` + 2 forward passes of every row.

    Args:
        model: a language model, with or without an adapter.
        rows: texts that are not packed.
        collate: tokens -> batch.
        end: the token that ends a text.
        seed: of the own texts.
    """
    log_likelihoods = np.zeros((2, 2))  # of the set and of own texts: sums, and numbers of tokens
    with eval_mode(model), seeded(seed, model.device):
        for start in ProgressBar(range(0, len(rows), _AT_ONCE), desc="compare with the base", unit="batch"):
            some = [_shortened(row, model) for row in rows[start : start + _AT_ONCE]]
            for own, texts in enumerate((some, _own_texts(model, some, end))):
                batch = collate(texts, torch.zeros(len(texts), 0))
                sums, counts = negative_log_likelihoods(cast(nn.Module, BareModel(model)), batch)
                log_likelihoods[own] += float(sums.double().sum()), int(counts.sum())
    on_set, on_samples = (math.exp(total / count) for total, count in log_likelihoods)
    return BaseGap("texts", on_set, on_samples, len(rows))


def _own_texts(model: PreTrainedModel, rows: Sequence[TokenRow], end: int | None) -> list[TokenRow]:
    """Return what the model writes in place of what the rows learn, no longer than that."""
    encoder_decoder = bool(cast(Any, model).config.is_encoder_decoder)
    prompts = [row.ids if encoder_decoder else row.ids[: _begin(row)] for row in rows]
    room = [len(row.labels) - (0 if encoder_decoder else _begin(row)) for row in rows]
    written = continuations(model, prompts, room, end)
    return [
        row_of(prompt, text, encoder_decoder=encoder_decoder) for prompt, text in zip(prompts, written, strict=True)
    ]


def _shortened(row: TokenRow, model: PreTrainedModel) -> TokenRow:
    """Return a row of which at most `MOST_TOKENS` are learned."""
    if cast(Any, model).config.is_encoder_decoder:
        return replace(row, labels=row.labels[:MOST_TOKENS])
    length = min(len(row.ids), _begin(row) + MOST_TOKENS)
    return TokenRow(row.ids[:length], row.labels[:length], (length,))


def _begin(row: TokenRow) -> int:
    """Return the first token of a causal model's row that is learned; nothing comes before the very first."""
    return max(1, int(np.argmax(row.labels != IGNORED)))
