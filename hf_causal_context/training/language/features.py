"""What a frozen language model sees in texts, as vectors: inputs for the density ratios of reweighting.

A text has one side, or of an encoder-decoder two: what the encoder reads and what the decoder writes. Shapes: N rows,
B batch, T tokens of a side, V token ids, D features, K concepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from ...bases.token_batches import Collation
from ...bases.tokens import Ids, TokenRow
from ...messages.progress import ProgressBar
from ..denoiser.features import principal_components

_TOKENS_AT_ONCE = 4096
_ROUNDING = 1e-5  # relative, of hidden states
# Single words drown in means over a text, and principal components drop what is rare. So the tokens that interventions
# make more or less frequent, by more than chance, are features of their own. The numbers were chosen on film reviews.
_TOKENS_PER_CONCEPT = 16
_LEAST_SCORE = 5.0  # in standard deviations
_PRESENCE_SCALE = 3.0  # of a token that is there, in deviations of all components


def text_features(model: PeftModel, rows: Sequence[TokenRow], collate: Collation, codes: Tensor) -> Tensor:
    """Features (N, D), float32, of texts as the base reads them.

    Principal components of hidden states (an early and the middle layer's mean over tokens, the middle one's last), the
    logarithm of the number of tokens, and the presence of the tokens that tell interventions most.

    Args:
        model: with an adapter that leaves the observational context as it is; bases in half precision need autocast.
        rows: the texts, not packed.
        collate: tokens -> batch, for rows that are not packed.
        codes: 0 for observational rows, k + 1 for those under an intervention on concept k, else -1; int64 (N,).

    Raises:
        ValueError: where the base overflows.
    """
    sides = [[row.ids for row in rows]]
    if model.config.is_encoder_decoder:
        sides.append([row.labels for row in rows])
    states = _hidden_states(model, rows, sides, collate)
    # What hardly varies is noise, of a prompt that is always the same. (NaN stays, to be refused.)
    constant = states.std(0) <= _ROUNDING * states.abs().mean(0)
    components = principal_components(states[:, ~constant])
    lengths = torch.tensor([[len(ids) for ids in side] for side in sides]).T.float().log()
    lengths = (lengths - lengths.mean(0)) / lengths.std(0).clamp(min=1e-3)
    present = torch.cat([torch.from_numpy(_presence(side, codes.numpy())) for side in sides], dim=1)
    return torch.cat(
        [components, lengths * components.std(0).max(), present * _PRESENCE_SCALE * components.std()], dim=1
    )


def tokens_digest(rows: Sequence[TokenRow]) -> str:
    """Return a hash of texts as the model reads them."""
    digest = blake2b(digest_size=8)
    for row in rows:
        digest.update(b"%d " % len(row.ids) + row.ids.tobytes() + row.labels.tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _hidden_states(
    model: PeftModel, rows: Sequence[TokenRow], sides: Sequence[Sequence[Ids]], collate: Collation
) -> Tensor:
    """Pooled hidden states of all sides side by side, (N, D)."""
    lengths_SN = torch.tensor([[len(ids) for ids in side] for side in sides])
    names = ("encoder_hidden_states", "decoder_hidden_states") if len(sides) > 1 else ("hidden_states",)
    body = cast(Any, model.get_base_model()).base_model  # without the head, whose logits would fill the memory
    training, features = model.training, []
    model.eval()
    order = list(_batches(lengths_SN.amax(0).numpy()))
    with ProgressBar(total=len(rows), desc="look at texts", unit="row") as bar:
        for numbers in order:
            some = [rows[number] for number in numbers]
            # No context is the observational one.
            inputs = collate(some, torch.zeros(len(some), 1)).inputs
            output = body(**inputs, use_cache=False, output_hidden_states=True)
            pooled = [
                _pooled(output[name], lengths_N[torch.from_numpy(numbers)])
                for name, lengths_N in zip(names, lengths_SN, strict=True)
            ]
            features.append(torch.cat(pooled, dim=1).cpu())
            bar.update(len(some))
    model.train(training)
    return torch.cat(features)[torch.from_numpy(np.argsort(np.concatenate(order)))]


def _pooled(states: Sequence[Tensor], lengths: Tensor) -> Tensor:
    """Hidden states (B, T, C) from the embeddings on, and lengths (B,) -> (B, 3 C), float32."""
    num_layers = len(states) - 1
    early, middle = states[num_layers // 4].float(), states[(num_layers + 1) // 2].float()
    lengths = lengths.to(middle.device)
    real = (torch.arange(middle.shape[1], device=middle.device) < lengths[:, None])[..., None]
    means = [torch.where(real, state, 0).sum(1) / lengths[:, None] for state in (early, middle)]
    return torch.cat([*means, middle[torch.arange(len(middle), device=middle.device), lengths - 1]], dim=1)


def _batches(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Numbers of the rows, the short ones first: so many at once that they have `_TOKENS_AT_ONCE` tokens, or one."""
    order = np.argsort(lengths, kind="stable")
    while len(order):
        tokens = lengths[order[:_TOKENS_AT_ONCE]]
        size = max(1, int(np.searchsorted(tokens * np.arange(1, len(tokens) + 1), _TOKENS_AT_ONCE, side="right")))
        yield order[:size]
        order = order[size:]


def _presence(texts: Sequence[Ids], codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Whether each text has the tokens whose frequency an intervention changes most, (N, up to 16 K): 0 or 1.

    Frequencies are the shares of texts that have a token, compared with the observational ones by a two-sample test.
    """
    found = [np.unique(ids) for ids in texts]
    sizes = np.bincount(codes[codes >= 0])[:, None]
    counts = np.zeros((len(sizes), max(int(own[-1]) for own in found) + 1))
    for own, code in zip(found, codes, strict=True):
        if code >= 0:
            counts[code, own] += 1
    pooled = (counts[0] + counts[1:]) / (sizes[0] + sizes[1:])
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / sizes[0] + 1 / sizes[1:]))
    scores = np.abs(counts[1:] / sizes[1:] - counts[0] / sizes[0]) / np.maximum(deviation, 1e-9)  # (K, V)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :_TOKENS_PER_CONCEPT]
    chosen = np.unique(best[np.take_along_axis(scores, best, axis=1) > _LEAST_SCORE])
    return np.stack([np.isin(chosen, own) for own in found]).astype(np.float32)
