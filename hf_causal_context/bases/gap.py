"""How far a base is from the observational set: what was measured, and what to say about it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .._files import BASE_GAP

# Of `BaseGap.factor`. The packaged base of digits is at 1.0 to 1.1 on such digits, at 1.2 where all are thick, and at
# 2.6 and more on other digits (MNIST), letters, faces, noise and empty images. A small model of film reviews is at 1.1
# to 1.3 on reviews, and at 5 and more on documentation and code.
NEAR = 1.4
FAR = 2.0


@dataclass(frozen=True)
class BaseGap:
    """A base's loss on rows of the observational set, beside its loss on samples that it drew itself.

    A base that makes what the set shows has the same loss on both. Losses of images are averaged over noise levels by
    their logarithms, so that every level counts alike, whatever the base predicts. Those of texts are perplexities.

    Attributes:
        content: "images" or "texts".
        on_set: the loss on observational rows.
        on_samples: the loss on as many samples, drawn with the rows' captions, classes or prompts.
        rows: how many.
    """

    content: Literal["images", "texts"]
    on_set: float
    on_samples: float
    rows: int

    @property
    def times(self) -> float:
        """How many times the loss on own samples the loss on the set is."""
        return self.on_set / self.on_samples

    @property
    def factor(self) -> float:
        """`times` or its inverse, whichever is larger: a set can also be too simple for the base."""
        return max(self.times, 1 / self.times)

    def advice(self, observational_rank: int | None) -> str:
        """One sentence for who trains an adapter; the rank is None where it is left to the default."""
        figures = self._figures()
        if self.factor < NEAR:
            rest = "the observational part has little to learn"
            rest = "no observational part is needed" if observational_rank == 0 else rest
            return f"The base already makes {self.content} like your observational set {figures}: {rest}."
        if observational_rank == 0:
            return (
                f"WARNING: The base is {self._distance} your observational set {figures}, and with "
                "--observational_rank 0 every concept learns the difference as well: combinations add it up, and come "
                "out worse than the base itself. Leave --observational_rank out."
            )
        rest = "; give it more --observational_steps or a larger --observational_rank" if self.factor >= FAR else ""
        return (
            f"The base is {self._distance} your observational set {figures}: the observational part will learn the "
            f"difference{rest}."
        )

    def note(self, observational_rank: int) -> str:
        """One sentence for who uses the adapter."""
        figures = self._figures()
        if self.factor < NEAR:
            return f"The base already made {self.content} like the observational set {figures}."
        if observational_rank == 0:
            return (
                f"**The base was {self._distance} the observational set {figures}, and this adapter has no "
                "observational part: every concept holds the difference as well, and combinations add it up. Expect "
                "them to fail.**"
            )
        return (
            f"The base was {self._distance} the observational set {figures}: the observational part holds the "
            "difference, and `observational=0` in a context leaves it out."
        )

    @property
    def _distance(self) -> str:
        return "far from" if self.factor >= FAR else "not quite"

    def _figures(self) -> str:
        loss, samples = ("loss", "samples") if self.content == "images" else ("perplexity", "texts")
        times = f"{self.times:.1f}" if self.times >= 1 else f"{self.times:.2f}"
        return f"({loss} {self.on_set:.3g} on it, {self.on_samples:.3g} on its own {samples}: {times} times)"

    def json(self) -> str:
        """Return what base_gap.json holds."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> BaseGap | None:
        """Read base_gap.json; None if there is none."""
        path = folder / BASE_GAP
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
