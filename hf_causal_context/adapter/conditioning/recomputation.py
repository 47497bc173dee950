"""Gradient checkpointing: what is computed again in backward has the contexts of its forward, or is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .frame import Frame
from .in_force import STATE


def in_backward() -> bool:
    """Whether this runs inside a backward pass, as the recomputation of a checkpoint does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def unknown_recomputation() -> RuntimeError:
    """Return the error for a recomputation that nothing tells the context of."""
    return RuntimeError(
        "A layer is computed again inside backward (gradient checkpointing), where it cannot be known which context "
        "the forward had. Use the model's own gradient_checkpointing_enable() or enable_gradient_checkpointing(), "
        "which are supported, or checkpoint the whole model with context= as one of its arguments."
    )


class _CheckpointWithFrame:
    """A model's checkpointing function that gives the recomputation the frame of its forward."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = STATE.box.frame
        settings = {**getattr(self.checkpoint, "keywords", {}), **kwargs}
        if frame is not None and settings.get("use_reentrant") is not False:
            # Its backward would go once for each segment through what was made outside, so segments make their own.
            frame = replace(frame, matrices={})
        return self.checkpoint(partial(_run_in_frame, frame, function), *args, **kwargs)


def _run_in_frame(frame: Frame | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    box = STATE.box
    outer, box.frame = box.frame, frame
    try:
        return function(*args, **kwargs)
    finally:
        box.frame = outer


def carry_frames_into_recomputation(model: nn.Module) -> None:
    """Make the checkpoints of a model's own gradient checkpointing carry the frame of their forward."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _CheckpointWithFrame):
            module._gradient_checkpointing_func = _CheckpointWithFrame(checkpoint)  # type: ignore[assignment]
