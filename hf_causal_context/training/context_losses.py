"""The loss of every context after each validation: printed with its change, logged, and kept for a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import Accelerator

from ..messages.progress import ProgressBar, say
from .arguments import AdapterArguments
from .loop.checkpoints import earlier_run, write_text

LOSSES = "validation_losses.json"


class ContextLosses:
    """Measures and tells the losses of contexts: of the held-out ones, or where there are none, of those trained on.

    Args:
        accelerator: prints and logs.
        arguments: of the run, whose folder holds validation_losses.json.
        name: of the loss, such as "perplexity".
        measures: context -> its loss now, the model being in eval mode.
        held_out: whether the contexts are held out.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: AdapterArguments,
        name: str,
        measures: Mapping[str, Callable[[], float]],
        *,
        held_out: bool,
    ) -> None:
        self._accelerator, self._path = accelerator, Path(arguments.output_dir, LOSSES)
        self._earlier_run = earlier_run(arguments)
        self._name, self._held_out = name, held_out
        self._measures = {c or arguments.observational_name: measure for c, measure in measures.items()}
        self._history: dict[int, dict[str, float]] = {}

    def begin(self, first: int) -> None:
        """In the main process, after `first` steps: a resumed run goes on from what was told until then."""
        path = self._earlier_run / LOSSES if self._earlier_run is not None else None
        if path is not None and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self._history = {int(step): losses for step, losses in stored.items() if int(step) <= first}

    def tell(self, step: int) -> None:
        """Measure all contexts; in the main process, print, log and keep their losses.

        Raises:
            CheckpointError: when they cannot be kept.
        """
        bar = ProgressBar(self._measures.items(), desc="measure losses", unit="context", delay=0)
        losses = {context: measure() for context, measure in bar}
        if not losses or not self._accelerator.is_main_process:
            return
        earlier = [known for known in self._history if known < step]  # a resumed run tells the last ones again
        say(self._table(step, losses, max(earlier, default=None)))
        tag = f"validation_{self._name.replace(' ', '_')}" + ("" if self._held_out else "_of_trained")
        self._accelerator.log({f"{tag}/{context}": loss for context, loss in losses.items()}, step=step)
        self._history = {known: self._history[known] for known in earlier} | {step: losses}
        text = json.dumps(self._history, indent=2, ensure_ascii=False) + "\n"
        write_text(self._path, self._path.parent, text)

    def _table(self, step: int, losses: Mapping[str, float], earlier: int | None) -> str:
        which = "held-out contexts" if self._held_out else "contexts that are trained on (none is held out)"
        since = "" if earlier is None else f", and its change since step {earlier}"
        before = self._history.get(earlier, {}) if earlier is not None else {}
        width, digits = max(map(len, losses)), max(len(f"{loss:.4f}") for loss in losses.values())
        lines = [f"Step {step}, {self._name} of {which}{since}:"]
        for context, loss in losses.items():
            change = f"  {loss - before[context]:+.4f}" if context in before else ""
            lines.append(f"  {context:<{width}}  {loss:{digits}.4f}{change}")
        return "\n".join(lines)
