"""Who runs a model: pipelines that tell it nothing, found among the callers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch

# What pipelines of diffusers call the number of images of each prompt.
COPIES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def images_of_pipeline() -> tuple[int, int] | None:
    """Prompts, and images of each, of a pipeline of diffusers that runs this model; None without one."""
    for caller in _callers("__call__"):
        known = caller.f_locals
        if hasattr(type(known.get("self")), "from_pipe") and isinstance(known.get("batch_size"), int):
            copies = [known[name] for name in COPIES if isinstance(known.get(name), int)]
            return known["batch_size"], copies[0] if copies else 1
    return None


def inputs_of_pipeline() -> int | None:
    """How many inputs a list has that a pipeline of transformers runs on; 0 if it cuts them up, None without one."""
    for caller in _callers("__call__", "forward"):
        if caller.f_globals.get("__name__") == "transformers.pipelines.base":
            known = caller.f_locals
            if any(kind.__name__ == "ChunkPipeline" for kind in type(known.get("self")).__mro__):
                return 0
            if isinstance(known.get("inputs"), list):
                return len(known["inputs"])
    return None


def _callers(*names: str) -> Iterator[FrameType]:
    caller = None if torch.compiler.is_compiling() else sys._getframe()
    while caller is not None:
        if caller.f_code.co_name in names:
            yield caller
        caller = caller.f_back
