"""A language model's perplexity on rows of each context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from ...bases.likelihoods import perplexity
from ...bases.token_batches import TextBatch, tokenized
from ...bases.tokens import Tokenization, TokenRow
from ...contexts import ConceptSet, Context
from ...data import InterventionalData
from ...errors import UserValueError
from ...messages.wording import quoted
from ..arguments import TextArguments
from ..context_losses import ContextLosses
from ..few_rows import few_rows, numbers_of_context

_HELD_OUT_ROWS = 200  # of each context
_TRAINED_ROWS = 64

Collate = Callable[[Sequence[TokenRow], Tensor], TextBatch]


def few_tokens(
    data: InterventionalData,
    context: str,
    num: int,
    tokenize: Tokenization,
    seed: int,
    rows: Sequence[TokenRow] | None = None,
) -> list[TokenRow]:
    """The tokens of up to `num` rows of a context; `rows` are those of all rows that are trained on, where known."""
    if rows is None:
        return list(tokenized(cast(Any, few_rows(data, context, num, seed)), tokenize))
    return [rows[number] for number in numbers_of_context(cast(Dataset, data.rows), context, num, seed)]


def rows_to_measure(
    data: InterventionalData, tokenize: Tokenization, seed: int, rows: Sequence[TokenRow] | None
) -> dict[str, list[TokenRow]]:
    """Some rows of the held-out contexts; where there are none, a few rows of each context that is trained on.

    Raises:
        ValueError: for a stream without rows of a context, or rows that cannot be tokenized.
    """
    if data.held_out:
        few = {c: few_tokens(data, c, _HELD_OUT_ROWS, tokenize, seed) for c in data.held_out}
    else:
        few = {c: few_tokens(data, c, _TRAINED_ROWS, tokenize, seed, rows) for c in data.contexts}
    if empty := [context for context, own in few.items() if not own]:
        kind = "held-out contexts" if data.held_out else "contexts"
        raise UserValueError(
            f"The stream has no rows of the {kind} {quoted(empty)}. Add them, or leave them out of "
            f"--{'held_out_contexts' if data.held_out else 'training_contexts'}."
        )
    return few


def perplexities(
    accelerator: Accelerator,
    model: PeftModel,
    rows: dict[str, list[TokenRow]],
    concepts: ConceptSet,
    collate: Collate,
    arguments: TextArguments,
    held_out: bool,
) -> ContextLosses:
    """Return what measures and tells the perplexities of these rows."""

    def measure(context: str) -> float:
        mask = concepts.mask([Context.parse(context)])
        return perplexity(model, _chunks(rows[context], mask, collate, arguments.train_batch_size))

    return ContextLosses(
        accelerator,
        arguments,
        "perplexity",
        {context: partial(measure, context) for context in rows},
        held_out=held_out,
    )


def _chunks(rows: Sequence[TokenRow], mask: Tensor, collate: Collate, size: int) -> Iterator[TextBatch]:
    """Rows of one context, mask (1, K), in batches."""
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        yield collate(some, mask.expand(len(some), -1))
