"""What happens around the steps of a training."""

from __future__ import annotations


class StepHooks:
    """What a model needs around the steps of its training; does nothing unless a subclass does."""

    def start_step(self, step: int) -> None:
        """Before the forward passes of an optimizer step, counted from 0."""

    def end_backward(self) -> None:
        """When the gradients of a step are complete, before they are clipped."""

    def end_step(self) -> None:
        """After the optimizer changed the parameters."""
