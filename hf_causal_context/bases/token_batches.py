"""Rows of text -> tokens -> padded batches.

Shapes: B rows, T tokens, L tokens of a decoder, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..errors import UserValueError
from ..messages.progress import ProgressBar
from .tokens import IGNORED, Tokenization, TokenRow

_SHOWN_CHARACTERS = 60  # of a row that is wrong


@dataclass
class TextBatch:
    """Rows on the model's device.

    `inputs`: what the model takes, such as `input_ids` (B, T). `targets` (B, T), of an encoder-decoder (B, L): what
    each position should predict, -100 where nothing is learned. `context` (B, K): the intervention mask.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    context: Tensor


class Collation:
    """Token rows -> a batch, padded on the right to the longest of them.

    Args:
        pad_token_id: fills rows up.
        device: where batches go.
        packed: rows hold several texts, told apart by their positions and by nothing else.
        decoder_inputs: of an encoder-decoder, labels (B, L) -> what its decoder reads (B, L).
    """

    def __init__(
        self,
        pad_token_id: int,
        device: torch.device,
        *,
        packed: bool = False,
        decoder_inputs: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._pad_token_id, self._device = pad_token_id, device
        self._packed, self._decoder_inputs = packed, decoder_inputs

    def __call__(self, rows: Sequence[TokenRow], context: Tensor) -> TextBatch:
        """Return the batch of rows whose contexts are (B, K)."""
        inputs = {"input_ids": _padded([row.ids for row in rows], self._pad_token_id)}
        width = inputs["input_ids"].shape[1]
        if self._packed:
            inputs["position_ids"] = torch.stack([_positions(row, width) for row in rows])
        else:
            lengths = torch.tensor([len(row.ids) for row in rows])
            inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        labels = _padded([row.labels for row in rows], IGNORED)
        if self._decoder_inputs is not None:
            inputs["decoder_input_ids"], targets = self._decoder_inputs(labels), labels
        else:
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in inputs.items()}
        return TextBatch(moved, targets.to(self._device), context.to(self._device))


def tokenize_all(rows: Dataset, tokenize: Tokenization, quiet: bool = False) -> list[TokenRow]:
    """Return the tokens of all rows.

    Raises:
        ValueError: for a row that cannot be tokenized, naming it.
    """
    bar = ProgressBar(rows.with_format(None), desc="tokenize", unit="row", disable=quiet)
    return list(tokenized(cast(Iterable[dict], bar), tokenize))


def tokenized(rows: Iterable[Mapping[str, Any]], tokenize: Tokenization) -> Iterator[TokenRow]:
    """The tokens of rows with a context.

    Raises:
        ValueError: for a row that cannot be tokenized, naming it.
    """
    for row in rows:
        try:
            yield tokenize(row)
        except ValueError as error:
            where = f"context {row['context']!r}" if row["context"] else "the observational context"
            begin = str(row[tokenize.content_column])[:_SHOWN_CHARACTERS]
            raise UserValueError(f"The row of {where} that begins {begin!r}: {error}") from error


def cut_rows(rows: Mapping[str, Sequence[TokenRow]], max_length: int) -> str | None:
    """Say how many rows of each context are cut, if any are."""
    cut = {context: sum(row.cut for row in own) for context, own in rows.items()}
    listed = ", ".join(
        f"{count} of {len(rows[context])} rows of {repr(context) if context else 'the observational context'}"
        for context, count in cut.items()
        if count
    )
    if not listed:
        return None
    return (
        f"Cut at --max_length={max_length}: {listed}. A text that is cut has no end, so that a model learns not to end "
        "such texts. Raise --max_length, or shorten them."
    )


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Arrays (T,) of different lengths -> (B, T)."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)


def _positions(row: TokenRow, width: int) -> Tensor:
    """(width,): every text begins at 0, and so does what fills the row up, as if it were one more."""
    return torch.cat([torch.arange(length) for length in (*row.lengths, width - len(row.ids))])
