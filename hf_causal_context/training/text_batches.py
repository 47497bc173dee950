"""Interventional texts -> the endless batches of one process, the same after a restart.

Shapes: B rows, T tokens, L tokens of a decoder, K concepts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from ..contexts import Context
from ..data import ContextSampler, InterventionalData, stream_batches
from .arguments import TextArguments
from .tokens import IGNORED, Tokenisation, TokenRow, pack
from .weights import batch_weights

_SHOWN_CHARACTERS = 60  # of a row that is wrong


@dataclass
class TextBatch:
    """Rows on the model's device.

    `inputs`: what the model takes, such as `input_ids` (B, T). `targets` (B, T), of an encoder-decoder (B, L): what
    each position should predict, -100 where nothing is learnt. `context` (B, K): the intervention mask.
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
        """The batch of rows whose contexts are (B, K)."""
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


_ROWS_LOOKED_AT = 64  # of a stream, for the average length


class TextBatches:
    """Batches for the `LanguageModelingObjective`: `batches(n)` yields the n-th and all that follow, on the device.

    Map-style data is tokenised once and kept in memory (4 to 8 bytes per token and 300 per row); a stream is tokenised
    as it is read.
    `num_rows` are the rows of map-style data, after packing; those that stand for combinations do not count.
    `tokens_per_row` is the average number of targets of a row, of a stream in the first batch.

    Args:
        data: what to train on.
        tokenise: row -> tokens.
        collate: tokens -> batch.
        arguments: batch size, seed, packing, shares of contexts.
        rank, world_size: of this process.
        rows: the tokens of map-style data, where they are known.

    Raises:
        ValueError: for rows that cannot be tokenised, or bad weights of contexts.
    """

    def __init__(
        self,
        data: InterventionalData,
        tokenise: Tokenisation,
        collate: Collation,
        arguments: TextArguments,
        rank: int = 0,
        world_size: int = 1,
        rows: Sequence[TokenRow] | None = None,
    ) -> None:
        self._data, self._tokenise, self._collate, self._arguments = data, tokenise, collate, arguments
        self._rank, self._world_size = rank, world_size
        self._weights = batch_weights(data, arguments)
        contexts = (*data.contexts, *data.reweighted)
        self._masks = {context: data.concepts.mask([Context.parse(context)])[0] for context in contexts}
        self.num_rows: int | None = None
        if isinstance(data.rows, Dataset):
            rows = rows if rows is not None else tokenise_all(data.rows, tokenise, quiet=rank > 0)
            by_context = self._by_context(rows)
            self._rows = [row for own in by_context.values() for row in own]
            self._contexts = [context for context, own in by_context.items() for _ in own]
            self.num_rows = sum(len(by_context[context]) for context in data.contexts)
            self.tokens_per_row = self._mean_targets(self._rows)
        else:
            first = next(stream_batches(data, _ROWS_LOOKED_AT, arguments.seed, weights=self._weights))
            self.tokens_per_row = self._mean_targets(list(tokenised(first, tokenise)))

    def __call__(self, start: int, num_observational: int = 0) -> Iterator[TextBatch]:
        """Batches from number `start` on; the first rows of the run are observational, as many as are given."""
        size, seed = self._arguments.train_batch_size, self._arguments.seed
        process = (self._rank, self._world_size)
        if self.num_rows is None:
            for rows in stream_batches(self._data, size, seed, start, *process, self._weights, num_observational):
                yield self._batch(list(tokenised(rows, self._tokenise)), [row["context"] for row in rows])
        else:
            sampler = ContextSampler(self._contexts, size, seed, 0, 0, *process, self._weights, num_observational)
            for batch in itertools.count(start):
                numbers = sampler.rows(sampler.slots(batch))
                yield self._batch([self._rows[n] for n in numbers], [self._contexts[n] for n in numbers])

    def _batch(self, rows: list[TokenRow], contexts: list[str]) -> TextBatch:
        return self._collate(rows, torch.stack([self._masks[context] for context in contexts]))

    def _mean_targets(self, rows: Sequence[TokenRow]) -> float:
        predicted = 0 if self._tokenise.encoder_decoder else 1  # nothing comes before a causal model's first token
        return float(np.mean([np.count_nonzero(row.labels[predicted:] != IGNORED) for row in rows]))

    def _by_context(self, rows: Sequence[TokenRow]) -> dict[str, list[TokenRow]]:
        """The rows of each context, and those that stand for combinations; packed, if they should be."""
        contexts = np.array(self._data.rows["context"])
        numbers = {context: np.flatnonzero(contexts == context) for context in self._data.contexts}
        by_context = {c: [rows[n] for n in own.tolist()] for c, own in (numbers | self._data.reweighted).items()}
        if not self._arguments.packing:
            return by_context
        return {context: pack(own, self._tokenise.max_length) for context, own in by_context.items()}


def tokenise_all(rows: Dataset, tokenise: Tokenisation, quiet: bool = False) -> list[TokenRow]:
    """The tokens of all rows.

    Raises:
        ValueError: for a row that cannot be tokenised, naming it.
    """
    bar = tqdm(rows.with_format(None), desc="tokenise", unit="row", delay=3, disable=quiet)
    return list(tokenised(cast(Iterable[dict], bar), tokenise))


def tokenised(rows: Iterable[Mapping[str, Any]], tokenise: Tokenisation) -> Iterator[TokenRow]:
    """The tokens of rows with a context.

    Raises:
        ValueError: for a row that cannot be tokenised, naming it.
    """
    for row in rows:
        try:
            yield tokenise(row)
        except ValueError as error:
            where = f"context {row['context']!r}" if row["context"] else "the observational context"
            begin = str(row[tokenise.content_column])[:_SHOWN_CHARACTERS]
            raise ValueError(f"The row of {where} that begins {begin!r}: {error}") from error


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Arrays (T,) of different lengths -> (B, T)."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return torch.from_numpy(padded)


def _positions(row: TokenRow, width: int) -> Tensor:
    """(width,): every text begins at 0, and so does what fills the row up, as if it were one more."""
    return torch.cat([torch.arange(length) for length in (*row.lengths, width - len(row.ids))])
