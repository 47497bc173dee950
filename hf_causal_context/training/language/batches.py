"""Interventional texts -> the endless batches of one process, the same after a restart.

Shapes: B rows, T tokens, L tokens of a decoder, K concepts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import numpy as np
import torch
from datasets import Dataset

from ...bases.packing import pack
from ...bases.token_batches import Collation, TextBatch, cut_rows, tokenize_all, tokenized
from ...bases.tokens import IGNORED, Tokenization, TokenRow
from ...contexts import Context
from ...data import ContextSampler, InterventionalData, stream_batches
from ..arguments import TextArguments
from ..weights import batch_weights

# Of a combination whose texts the adapter writes itself, beside 1 for a context of the data: it has less time to learn.
OWN_SHARE, MOST_OWN = 2.0, 1.5  # and of all of them together, beside all contexts of the data
_ROWS_LOOKED_AT = 64  # of a stream, for the average length


class TextBatches:
    """Batches for the `LanguageModelingObjective`: `batches(n)` yields the n-th and all that follow, on the device.

    Map-style data is tokenized once and kept in memory (4 to 8 bytes per token and 300 per row); a stream is tokenized
    as it is read.
    `num_rows` are the rows of map-style data, after packing; those that stand for combinations do not count.
    `tokens_per_row` is the average number of targets of a row, of a stream in the first batch.

    Args:
        data: what to train on.
        tokenize: row -> tokens.
        collate: tokens -> batch.
        arguments: batch size, seed, packing, shares of contexts.
        rank, world_size: of this process.
        rows: the tokens of map-style data, where they are known.

    Raises:
        ValueError: for rows that cannot be tokenized, or bad weights of contexts.
    """

    def __init__(
        self,
        data: InterventionalData,
        tokenize: Tokenization,
        collate: Collation,
        arguments: TextArguments,
        rank: int = 0,
        world_size: int = 1,
        rows: Sequence[TokenRow] | None = None,
    ) -> None:
        self._data, self._tokenize, self._collate, self._arguments = data, tokenize, collate, arguments
        self._rank, self._world_size = rank, world_size
        self._weights = batch_weights(data, arguments)
        contexts = (*data.contexts, *data.reweighted)
        self._masks = {context: data.concepts.mask([Context.parse(context)])[0] for context in contexts}
        self.num_rows: int | None = None
        if isinstance(data.rows, Dataset):
            rows = rows if rows is not None else tokenize_all(data.rows, tokenize, quiet=rank > 0)
            by_context = self._by_context(rows)
            self._tell_cut_rows({context: by_context[context] for context in data.contexts})
            if arguments.packing:
                by_context = {context: pack(own, tokenize.max_length) for context, own in by_context.items()}
            self._rows = [row for own in by_context.values() for row in own]
            self._contexts = [context for context, own in by_context.items() for _ in own]
            self.num_rows = sum(len(by_context[context]) for context in data.contexts)
            self.tokens_per_row = self._mean_targets(self._rows)
        else:
            first = next(stream_batches(data, _ROWS_LOOKED_AT, arguments.seed, weights=self._weights))
            looked_at = list(tokenized(first, tokenize))
            by_context = {context: [] for context in data.contexts}
            for row, tokens in zip(first, looked_at, strict=True):
                by_context[row["context"]].append(tokens)
            self._tell_cut_rows(by_context)
            self.tokens_per_row = self._mean_targets(looked_at)

    def __call__(self, start: int, num_observational: int = 0) -> Iterator[TextBatch]:
        """Batches from number `start` on; the first rows of the run are observational, as many as are given."""
        size, seed = self._arguments.train_batch_size, self._arguments.seed
        process = (self._rank, self._world_size)
        if self.num_rows is None:
            for rows in stream_batches(self._data, size, seed, start, *process, self._weights, num_observational):
                yield self._batch(list(tokenized(rows, self._tokenize)), [row["context"] for row in rows])
        else:
            sampler = ContextSampler(self._contexts, size, seed, 0, 0, *process, self._weights, num_observational)
            for batch in itertools.count(start):
                numbers = sampler.rows(sampler.slots(batch))
                yield self._batch([self._rows[n] for n in numbers], [self._contexts[n] for n in numbers])

    def joined_by(self, rows: Mapping[str, Sequence[TokenRow]]) -> TextBatches:
        """Return these batches with rows of further contexts."""
        joined = copy(self)
        share = min(OWN_SHARE, MOST_OWN * len(self._data.contexts) / max(1, len(rows)))
        joined._weights = dict.fromkeys(rows, share) | self._weights
        joined._masks = self._masks | {c: self._data.concepts.mask([Context.parse(c)])[0] for c in rows}
        if self._arguments.packing:
            rows = {context: pack(own, self._tokenize.max_length) for context, own in rows.items()}
        joined._rows = [*self._rows, *(row for own in rows.values() for row in own)]
        joined._contexts = [*self._contexts, *(context for context, own in rows.items() for _ in own)]
        return joined

    def _batch(self, rows: list[TokenRow], contexts: list[str]) -> TextBatch:
        return self._collate(rows, torch.stack([self._masks[context] for context in contexts]))

    def _tell_cut_rows(self, by_context: Mapping[str, Sequence[TokenRow]]) -> None:
        message = cut_rows(by_context, self._tokenize.max_length)
        if message and self._rank == 0:
            print(message, flush=True)

    def _mean_targets(self, rows: Sequence[TokenRow]) -> float:
        predicted = 0 if self._tokenize.encoder_decoder else 1  # nothing comes before a causal model's first token
        return float(np.mean([np.count_nonzero(row.labels[predicted:] != IGNORED) for row in rows]))

    def _by_context(self, rows: Sequence[TokenRow]) -> dict[str, list[TokenRow]]:
        """Return the rows of each context, and those that stand for combinations."""
        contexts = np.array(self._data.rows["context"])
        numbers = {context: np.flatnonzero(contexts == context) for context in self._data.contexts}
        return {c: [rows[n] for n in own.tolist()] for c, own in (numbers | self._data.reweighted).items()}
