"""How likely texts are under a language model.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .token_batches import TextBatch
from .tokens import IGNORED


def negative_log_likelihoods(model: nn.Module, batch: TextBatch) -> tuple[Tensor, Tensor]:
    """-log p of the targets of each row in its context, in nats, summed: (B,), and their number (B,)."""
    logits = model(**batch.inputs, context=batch.context, use_cache=False).logits.float()
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none"
    )  # (B, T)
    return losses.sum(1), (batch.targets != IGNORED).sum(1)


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[TextBatch]) -> float:
    """Return exp of the mean -log p of all targets in the batches; the model is used in the mode it is in."""
    total, count = 0.0, 0
    for batch in batches:
        sums, counts = negative_log_likelihoods(model, batch)
        total, count = total + float(sums.sum()), count + int(counts.sum())
    return float(torch.tensor(total / count, dtype=torch.float64).exp())  # infinite, not an error, if it diverged
