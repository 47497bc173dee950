"""The losses of a training by context: for its progress bar and trackers, and drawn when it ends.

Shapes: B samples, K concepts, C kinds of contexts, S steps between synchronizations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._files import checkpoint_steps
from ...contexts import ConceptSet, Context
from .checkpoints import CheckpointError, write_file, write_text
from .loss_image import loss_image

LOSSES, IMAGE = "training_losses.json", "training.png"
MOST_POINTS = 200  # of a curve
_KEPT = 0.95  # of the running sums, at every step


def kinds_of_contexts(concepts: ConceptSet, contexts: Iterable[str], observational_name: str) -> dict[str, Tensor]:
    """Return which concepts are on (K,), bool, by name; contexts that differ in strengths alone are of one kind."""
    parsed = [Context.parse(context) for context in contexts]
    named = {"+".join(context.targets) or observational_name: context for context in parsed}
    return {name: concepts.mask([Context(*context.targets)])[0] != 0 for name, context in named.items()}


class LossRecord:
    """Means of the losses of every kind of context; nothing here makes the host wait for the device.

    Args:
        kinds: from `kinds_of_contexts`.
        num_steps: of the run.
        steps_at_once: between two synchronizations, at most.
        device: of the losses.

    Attributes:
        names: of the kinds.
        sums: per step, the sums of the losses of this process and their numbers, (S, 2, C).
    """

    def __init__(self, kinds: Mapping[str, Tensor], num_steps: int, steps_at_once: int, device: torch.device) -> None:
        self.names = tuple(kinds)
        self._kinds_CK = torch.stack(list(kinds.values())).to(device) if kinds else None
        self.sums = torch.zeros(steps_at_once, 2, len(kinds), device=device)
        self._every = -(-num_steps // MOST_POINTS)
        self._running, self._since_point = np.zeros((2, 2, len(kinds)))
        self._points: list[dict[str, Any]] = []
        self._sums: dict[int, dict[str, list[list[float]]]] = {}  # after the steps of checkpoints

    def add(self, place: int, context_BK: Tensor, losses_B: Tensor, apart_B: Tensor | None = None) -> None:
        """Take in the losses of samples, of the step with this place among those not synchronized.

        Those that `apart_B` says are of no kind, whatever their context.
        """
        assert self._kinds_CK is not None
        of_kind_BC = (context_BK.ne(0)[:, None] == self._kinds_CK).all(2).float()
        if apart_B is not None:
            of_kind_BC *= ~apart_B[:, None]
        self.sums[place, 0] += losses_B.detach().float() @ of_kind_BC
        self.sums[place, 1] += of_kind_BC.sum(0)

    def split(self, sums: list[float], num_steps: int) -> np.ndarray:
        """Return the sums of steps, which stand one after the other, as (steps, 2, C)."""
        return np.array(sums).reshape(num_steps, 2, len(self.names))

    def note(self, step: int, rate: float, new: np.ndarray) -> dict[str, float]:
        """Take in a step's sums over all processes (2, C), and the learning rate after it; return the running means."""
        self._running = _KEPT * self._running + new
        self._since_point = self._since_point + new
        if step % self._every == 0:
            self._points.append({"step": step, "learning_rate": rate, "losses": self._means(self._since_point)})
            self._since_point = np.zeros_like(new)
        return self._means(self._running)

    def _means(self, sums_2C: np.ndarray) -> dict[str, float]:
        seen = zip(self.names, *sums_2C.tolist(), strict=True)
        return {name: total / count for name, total, count in seen if count}

    def save(self, folder: Path, step: int) -> None:
        """Keep what was noted until a step, and draw it; say so where that cannot be written."""
        if not self._running.any():
            return
        sums = np.stack([self._running, self._since_point])
        self._sums[step] = {name: sums[:, :, number].tolist() for number, name in enumerate(self.names)}
        self._sums = {known: self._sums[known] for known in checkpoint_steps(folder) if known in self._sums}
        text = json.dumps({"points": self._points, "sums": self._sums}, ensure_ascii=False) + "\n"
        try:
            write_text(folder / LOSSES, folder, text)
            if any(point["losses"] for point in self._points):
                write_file(folder / IMAGE, folder, loss_image(self.names, self._points).save)
        except CheckpointError as error:  # no reason to end a training; without room its checkpoints will say so
            print(f"The losses could not be kept for {IMAGE} ({error.__cause__}). The training goes on.", flush=True)

    def load(self, folder: Path, step: int) -> None:
        """Go on from what was kept, until the step of a checkpoint."""
        path = folder / LOSSES
        if not path.exists():
            return
        stored = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stored, list):  # of a run that is older than the sums
            stored = {"points": stored, "sums": {}}
        self._points = [point for point in stored["points"] if point["step"] <= step]
        self._sums = {int(known): sums for known, sums in stored["sums"].items() if int(known) <= step}
        for number, name in enumerate(self.names):
            if name in (sums := self._sums.get(step, {})):
                self._running[:, number], self._since_point[:, number] = sums[name]
