"""When a training run stops because validation no longer improves."""

from __future__ import annotations

import math


class EarlyStopping:
    """Counts validations without a loss that is better by more than `min_delta`; part of a checkpoint.

    Args:
        patience: so many of them in a row end the run.
        min_delta: the smallest improvement that counts.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = math.inf, 0

    def should_stop(self, loss: float) -> bool:
        """Note a validation's loss; whether to stop after it."""
        if loss < self.best - self.min_delta:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict()`."""
        self.best, self.waited = state["best"], int(state["waited"])
