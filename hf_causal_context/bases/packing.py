"""Several texts in one row, told apart by their positions."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserValueError
from .language import num_embeddings
from .tokens import IGNORED, TokenRow


def pack(rows: Sequence[TokenRow], max_length: int) -> list[TokenRow]:
    """Fill rows of `max_length` tokens with several texts: the longest first, each where it fits best."""
    packed: list[list[int]] = []
    spaces: list[int] = []  # of rows that are not full, each size once, in order
    with_space: defaultdict[int, list[int]] = defaultdict(list)
    for number in sorted(range(len(rows)), key=lambda n: -len(rows[n].ids)):
        length = len(rows[number].ids)
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            space, row = max_length, len(packed)
            packed.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del spaces[place]
        packed[row].append(number)
        if left := space - length:
            if not with_space[left]:
                bisect.insort(spaces, left)
            with_space[left].append(row)
    return [_joined([rows[number] for number in numbers]) for numbers in packed]


def _joined(rows: Sequence[TokenRow]) -> TokenRow:
    labels = [row.labels.copy() for row in rows]
    for label in labels:
        label[0] = IGNORED  # the text before it is another one
    ids = np.concatenate([row.ids for row in rows])
    return TokenRow(ids, np.concatenate(labels), tuple(len(row.ids) for row in rows))


@torch.no_grad()
def check_packing(model: PreTrainedModel, batch_size: int = 2) -> None:
    """Compare packed texts with the same texts alone, on the model itself.

    transformers tells the texts of a row apart by their positions, where a model supports it and gets no mask; flash
    attention only in batches of one row.

    Raises:
        ValueError: for a model whose texts would see each other.
    """
    name = type(model).__name__
    refusal = f"--packing: {name} does not keep the texts of a row apart. Leave it out."
    if model.config.is_encoder_decoder:
        raise UserValueError(refusal)
    training, device = model.training, model.device
    rows = min(batch_size, 2)
    tokens = torch.arange(rows * 16, device=device).view(rows, 16) % num_embeddings(model)
    positions = torch.cat([torch.arange(7, device=device), torch.arange(9, device=device)]).expand(rows, -1)

    def logits(ids: Tensor, **arguments: Any) -> Tensor:
        return model(input_ids=ids, use_cache=False, **arguments).logits[:, -9:].float()

    model.eval()
    try:
        alone, joined = logits(tokens[:, 7:]), logits(tokens)
        packed = logits(tokens, position_ids=positions)
    except TypeError as error:
        raise UserValueError(f"{refusal} ({error})") from error
    finally:
        model.train(training)
    # What is left of the influence that the first text has on the second one without positions: 1e-6 where texts are
    # kept apart, and rounding in half precision.
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    if not (packed - alone).abs().max() <= tolerance * (joined - alone).abs().max():
        raise UserValueError(refusal)
