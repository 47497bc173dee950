"""Which row is trained on when: contexts mixed within every batch, the same after a restart.

The g-th sample ever drawn is a slot, and its row is a function of (seed, g) alone. Contexts are interleaved by stride
scheduling: the k-th draw of a context with share w falls due at time (k + 1/2) / w, and slots are numbered in the order
of these times. With equal shares this is a round-robin, so C slots in a row hold all C contexts. Contexts that differ
in their strengths only share one share, so that a concept with rows at many strengths gets no more than the others.
Where the first slots are to be observational, the schedule begins after them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Features, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ..contexts import Context
from ..errors import UserTypeError, UserValueError
from ..messages.wording import quoted
from .columns import known_features, of_contexts
from .interventional import InterventionalData

IndexArray = NDArray[np.int64]

SHUFFLE_BUFFER = 1000
INPUT_SHARDS = 10


class ContextSampler(Sampler[list[int]]):
    """Batch sampler over a dataset given the context of each of its rows; balanced, deterministic and resumable.

    Micro-batch i of process `rank` is slots (i world_size + rank) batch_size onwards. Yields lists of `batch_size` row
    numbers for the micro-batches `start` to `num_batches` - 1. Within a context every row is drawn once before any is
    drawn again. `weights` maps contexts to their relative share of the slots; those not named have weight 1, divided
    among the strengths of the same targets. The first `num_observational` slots are of the observational context alone.

    Raises:
        ValueError: for no rows, numbers out of range, weights that are unknown, negative, not finite or all zero, or
            observational slots without observational rows.
    """

    def __init__(
        self,
        contexts: Iterable[str],
        batch_size: int,
        seed: int,
        num_batches: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: Mapping[str, float] | None = None,
        num_observational: int = 0,
    ) -> None:
        _check_numbers(batch_size, seed, start, rank, world_size)
        if num_batches < start:
            raise UserValueError(
                f"num_batches={num_batches} must be at least start={start}: it counts skipped ones too."
            )
        number_of: dict[str, int] = {}
        codes = np.fromiter((number_of.setdefault(context, len(number_of)) for context in contexts), dtype=np.int32)
        if not number_of:
            raise UserValueError("No rows to sample from: contexts= is empty. Give the context of every row.")
        names = sorted(number_of)
        by_context = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
        self._rows = [by_context[number_of[name]] for name in names]
        self._shares = shares_of(names, weights)
        self._begin = _beginning(names, num_observational)
        self._shuffled: dict[int, tuple[int, IndexArray]] = {}
        self.contexts = tuple(names)
        self.batch_size, self.seed, self.num_batches, self.start = batch_size, seed, num_batches, start
        self.rank, self.world_size = rank, world_size

    def slots(self, batch: int) -> range:
        """Return the slots of micro-batch number `batch` of this process."""
        return slots_of(batch, self.batch_size, self.rank, self.world_size)

    def __len__(self) -> int:
        return self.num_batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.num_batches):
            yield self.rows(self.slots(batch))

    def rows(self, slots: range) -> list[int]:
        """Return the row numbers of some slots."""
        chosen, draws = schedule(self._shares, slots.start, slots.stop, self._begin)
        numbers = np.empty(len(chosen), dtype=np.int64)
        for context, rows in enumerate(self._rows):
            places = np.flatnonzero(chosen == context)
            epochs, positions = np.divmod(draws[places], len(rows))
            for epoch in np.unique(epochs):
                in_epoch = epochs == epoch
                numbers[places[in_epoch]] = self._shuffle(context, int(epoch))[positions[in_epoch]]
        return numbers.tolist()

    def _shuffle(self, context: int, epoch: int) -> IndexArray:
        # A cache, not a state: the permutation depends on (seed, context, epoch) only.
        if self._shuffled.get(context, (-1,))[0] != epoch:
            shuffled = np.random.default_rng((self.seed, context, epoch)).permutation(self._rows[context])
            self._shuffled[context] = (epoch, shuffled)
        return self._shuffled[context][1]


def slots_of(batch: int, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """Return the slots of a process's micro-batch number `batch`."""
    first = (batch * world_size + rank) * batch_size
    return range(first, first + batch_size)


def stream_batches(
    data: InterventionalData,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    weights: Mapping[str, float] | None = None,
    num_observational: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Endless micro-batches of streaming data, from number `start` on: lists of `batch_size` rows.

    Slots are those of `ContextSampler`. Each context is a stream of its own, shuffled anew in every epoch; one source
    with a context column is therefore read once per context. Skipped rows are read, but not decoded. Iterate in the
    main process or in one worker: `datasets` divides a stream among several.

    Raises:
        ValueError: for numbers out of range, bad weights, a context without rows, or observational slots without an
            observational context.
        TypeError: for data that is not streaming.
    """
    _check_numbers(batch_size, seed, start, rank, world_size)
    if not isinstance(data.rows, IterableDataset):
        raise UserTypeError("The data is not streaming. Use ContextSampler, or load it with streaming=True.")
    shares, begin = shares_of(data.contexts, weights), _beginning(data.contexts, num_observational)
    return _stream_batches(data.rows, data.contexts, shares, begin, batch_size, seed, start, rank, world_size)


def _stream_batches(
    rows: IterableDataset,
    contexts: Sequence[str],
    shares: NDArray[np.float64],
    begin: tuple[int, int],
    batch_size: int,
    seed: int,
    start: int,
    rank: int,
    world_size: int,
) -> Iterator[list[dict[str, Any]]]:
    _, features = known_features(rows)
    streams = [_endless(rows.decode(False), context, seed) for context in contexts]
    for batch in itertools.count():
        chosen, _ = schedule(shares, batch * batch_size, (batch + 1) * batch_size, begin)
        examples = [next(streams[context]) for context in chosen.tolist()]
        if batch % world_size == rank and batch // world_size >= start:
            yield [_decoded(example, features) for example in examples]


def _decoded(example: dict[str, Any], features: Features) -> dict[str, Any]:
    try:
        return features.decode_example(example)
    except Exception as error:  # decoders raise whatever they like, and seldom which file it was
        paths = [value["path"] for value in example.values() if isinstance(value, dict) and value.get("path")]
        where = ", ".join(paths) or f"A row of the context {example['context']!r}"
        raise UserValueError(f"{where}: {error}") from error


def _endless(rows: IterableDataset, context: str, seed: int) -> Iterator[dict[str, Any]]:
    # More input shards than there are would only cost threads.
    stream = of_contexts(rows, (context,)).shuffle(
        seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=min(INPUT_SHARDS, rows.num_shards)
    )
    for epoch in itertools.count():
        stream.set_epoch(epoch)
        empty = True
        for example in stream:
            empty = False
            yield example
        if empty:
            raise UserValueError(f"The stream has no rows of the context {context!r}. Add them, or remove the context.")


def schedule(
    shares: NDArray[np.float64], first: int, last: int, begin: tuple[int, int] = (0, 0)
) -> tuple[IndexArray, IndexArray]:
    """Context and draw number within the context of the slots `first` to `last` - 1; shares (C,) sum to 1.

    `begin`: how many slots at the beginning are of one context, and the number of that context.
    """
    num_begin, context = begin
    alone = np.arange(min(first, num_begin), min(last, num_begin))
    contexts, draws = _interleaved(shares, max(first - num_begin, 0), max(last - num_begin, 0))
    draws = np.where(contexts == context, draws + num_begin, draws)
    return np.concatenate([np.full_like(alone, context), contexts]), np.concatenate([alone, draws])


def _interleaved(shares: NDArray[np.float64], first: int, last: int) -> tuple[IndexArray, IndexArray]:
    # Up to time t about t draws have fallen due, at most one half more or fewer per context.
    margin = len(shares) / 2 + 1
    # Draw 0 is due at 1 / (2 share).
    begin = np.maximum(np.ceil((first - margin) * shares - 0.5), 0).astype(np.int64)
    end = np.maximum(np.ceil((last + margin) * shares - 0.5), 0).astype(np.int64)
    contexts = np.repeat(np.arange(len(shares)), end - begin)
    draws = np.concatenate([np.arange(low, high) for low, high in zip(begin, end, strict=True)])
    order = np.lexsort((contexts, (draws + 0.5) / shares[contexts]))
    order = order[first - begin.sum() : last - begin.sum()]
    return contexts[order], draws[order]


def shares_of(contexts: Sequence[str], weights: Mapping[str, float] | None) -> NDArray[np.float64]:
    """Return the shares of contexts in the slots (C,), which sum to 1; see `ContextSampler` for `weights`.

    Raises:
        ValueError: for weights that are unknown, negative, not finite or all zero.
    """
    given = {str(Context.parse(context)): weight for context, weight in (weights or {}).items()}
    if unknown := sorted(set(given) - set(contexts)):
        raise UserValueError(
            f"weights= names {quoted(unknown)}, which has no rows. Contexts of the rows: {quoted(contexts)} ('' is "
            "observational)."
        )
    targets = [Context.parse(context).targets for context in contexts]
    num_strengths = Counter(targets)
    pairs = zip(contexts, targets, strict=True)
    values = np.array([given.get(context, 1 / num_strengths[own]) for context, own in pairs], dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise UserValueError(
            f"weights={dict(weights or {})!r} must be finite numbers, none negative and not all zero: each is the "
            "relative share of a context."
        )
    return values / values.sum()


def _beginning(contexts: Sequence[str], num_observational: int) -> tuple[int, int]:
    if num_observational < 0 or (num_observational and "" not in contexts):
        raise UserValueError(
            f"num_observational={num_observational} must be 0 or more, and 0 where there are no observational rows. "
            f"Contexts of the rows: {quoted(contexts)}."
        )
    return num_observational, list(contexts).index("") if num_observational else 0


def _check_numbers(batch_size: int, seed: int, start: int, rank: int, world_size: int) -> None:
    if batch_size < 1 or seed < 0 or start < 0:
        raise UserValueError(
            f"batch_size={batch_size} must be at least 1, seed={seed} and start={start} must not be negative."
        )
    if not 0 <= rank < world_size:
        raise UserValueError(f"rank={rank} must be 0 to world_size - 1, and world_size={world_size} at least 1.")
