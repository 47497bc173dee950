"""A few rows of one context, for measurements that must not take long: the same ones whenever they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset

from ..bases.diffusion_base import DiffusionBase
from ..data import InterventionalData
from ..data.columns import Rows, of_contexts
from .denoiser.objectives import Batch
from .noise import Draws


def few_numbers(num_rows: int, num: int, seed: int) -> list[int]:
    """Up to `num` of the numbers below `num_rows`, drawn without replacement, in order."""
    return sorted(np.random.default_rng((seed, num_rows)).permutation(num_rows)[:num].tolist())


def numbers_of_context(rows: Dataset, context: str, num: int, seed: int) -> list[int]:
    """Up to `num` numbers of rows of one context."""
    contexts = rows.with_format(None)["context"][:]  # a format would read all columns
    numbers = np.flatnonzero(np.array(contexts, dtype=object) == context)
    return numbers[few_numbers(len(numbers), num, seed)].tolist()


def few_rows(data: InterventionalData, context: str, num: int, seed: int) -> Rows:
    """Up to `num` rows of a context, held out or trained on; of a stream the first ones."""
    rows = data.held_out.get(context, data.rows)
    if isinstance(rows, Dataset):
        return rows.select(numbers_of_context(rows, context, num, seed))
    return of_contexts(rows, (context,)).take(num)


def only_few(data: InterventionalData, context: str, num: int, seed: int) -> InterventionalData:
    """Return the data as if it had these rows only: a stream, of which nothing is computed ahead."""
    rows = few_rows(data, context, num, seed)
    stream = rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows
    return replace(data, rows=stream, contexts=(context,), held_out={}, counts=None, reweighted={}, files={})


def joined(batches: Sequence[Batch], base: DiffusionBase) -> Batch:
    """Return the rows of several batches in one, on the CPU, with the draws of the first slots of seed 0."""
    rows = [
        {name: tensor[i].cpu() for name, tensor in batch.conditions.items()}
        for batch in batches
        for i in range(len(batch.clean))
    ]
    clean = torch.cat([batch.clean.cpu() for batch in batches])
    context = torch.cat([batch.context.cpu() for batch in batches])
    captions = [caption for batch in batches for caption in batch.captions]
    masks = [batch.loss_mask.cpu() for batch in batches if batch.loss_mask is not None]
    mask = torch.cat(masks) if masks else None
    return Batch(clean, context, base.join_conditions(rows), Draws(0, range(len(clean))), mask, captions)


def part_of(batch: Batch, rows: range, draws: Draws, device: torch.device) -> Batch:
    """Return some rows of a batch, with other draws, on a device."""
    chosen = slice(rows.start, rows.stop)
    conditions = {name: tensor[chosen].to(device) for name, tensor in batch.conditions.items()}
    clean, context = batch.clean[chosen].to(device), batch.context[chosen].to(device)
    mask = None if batch.loss_mask is None else batch.loss_mask[chosen].to(device)
    return Batch(clean, context, conditions, draws, mask, batch.captions[chosen])
