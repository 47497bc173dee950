"""Language modeling: a batch -> one loss per row.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...bases.likelihoods import negative_log_likelihoods
from ...bases.token_batches import TextBatch


class LanguageModelingObjective:
    """The next token, or the completion of an encoder-decoder: -log p of whole rows, in nats.

    Losses are sums over a row's targets, divided by what all rows have on average: so the mean over rows is per token,
    every token counts alike, and batches need not know of each other.

    Args:
        tokens_per_row: average number of targets.
    """

    def __init__(self, tokens_per_row: float) -> None:
        self.tokens_per_row = tokens_per_row

    def __call__(self, model: nn.Module, batch: TextBatch) -> Tensor:
        """Losses (B,), one per row."""
        sums, _ = negative_log_likelihoods(model, batch)
        return sums / self.tokens_per_row
