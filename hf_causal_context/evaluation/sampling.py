"""Samples of an adapter and of its base from the same seeds, read as they are made.

Shapes: N images (N, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..bases.diffusion_base import DiffusionBase
from ..contexts import ConceptSet, Context
from ..messages.progress import ProgressBar
from .readings import NUM_EXAMPLES, Measurements, Reader

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MAX_CURVE_SAMPLES = 128  # the curves compare means at equal seeds, which needs fewer samples than a distance


@dataclass
class PixelChange:
    """The largest and the mean absolute difference of images at equal seeds, over all that were added."""

    largest: float = 0.0
    _sum: float = 0.0
    _count: int = 0

    @property
    def mean(self) -> float:
        """Mean absolute difference."""
        return self._sum / max(1, self._count)

    def add(self, samples: Tensor, base: Tensor) -> None:
        """Take in rows of equal seeds (N, ...)."""
        difference = (samples.double() - base.double()).abs()
        self.largest = max(self.largest, float(difference.max()))
        self._sum += float(difference.sum())
        self._count += difference.numel()


Job = tuple[Context, int]  # and a seed


class Readings:
    """What is read of images that come in batches: so many of each kind, one kind after the other."""

    def __init__(self, read: Reader, kinds: Sequence[tuple[str, int]]) -> None:
        self._read = read
        self._names = [name for name, _ in kinds]
        self._places = iter([place for place, (_, number) in enumerate(kinds) for _ in range(number)])
        self._parts: list[list[Measurements]] = [[] for _ in kinds]

    def add(self, images: Tensor) -> None:
        """Take in the next images (N, C, H, W), which may be of several kinds."""
        for place, rows in Counter(islice(self._places, len(images))).items():
            own, images = images[:rows], images[rows:]
            parts = self._parts[place]
            parts.append(self._read(own, self._names[place], max(0, NUM_EXAMPLES - sum(map(len, parts)))))

    def of_kinds(self) -> list[Measurements]:
        """Return the readings of every kind."""
        return [Measurements.cat(parts) for parts in self._parts]


@dataclass
class Sampler:
    """Draws and reads samples in batches, which contexts share.

    Attributes:
        base: the pipeline with the adapter attached.
        draw: contexts with seeds -> their images, batch by batch; `generate_jobs` with everything else settled.
        read: what is kept of them.
        advance: told the number of images after every batch.
    """

    base: DiffusionBase
    draw: Callable[[Sequence[Job]], Iterator[Tensor]]
    read: Reader
    advance: Callable[[int], object] = lambda num: None

    def samples(self, wanted: Sequence[tuple[Context, Sequence[int]]]) -> list[Measurements]:
        """Readings of each context at its seeds.

        Raises:
            ValueError: for images that are not finite.
        """
        names = [f"Samples of context {str(context) or '(observational)'!r}" for context, _ in wanted]
        readings = Readings(self.read, [(name, len(seeds)) for name, (_, seeds) in zip(names, wanted, strict=True)])
        for images in self.draw([(context, seed) for context, seeds in wanted for seed in seeds]):
            readings.add(images)
            self.advance(len(images))
        return readings.of_kinds()

    def empty_and_base(
        self, groups: Sequence[Sequence[int]], change: PixelChange
    ) -> tuple[list[Measurements], list[Measurements]]:
        """Readings of the empty context, and of the base without its adapter; `change` takes in their difference.

        Raises:
            ValueError: for images that are not finite.
        """
        of_empty = Readings(self.read, [("Samples of context '(observational)'", len(group)) for group in groups])
        of_base = Readings(self.read, [("Samples of the base", len(group)) for group in groups])
        jobs = [(Context(), seed) for group in groups for seed in group]
        # Text encoders may have a part of the adapter, too.
        parts = [part for part in self.base.pipe.components.values() if isinstance(part, nn.Module)]
        for empty in self.draw(jobs):
            batch, jobs = jobs[: len(empty)], jobs[len(empty) :]
            of_empty.add(empty)
            with adapters_disabled(*parts):
                base = torch.cat(list(self.draw(batch)))  # in equal batches, so that equal weights give equal images
            of_base.add(base)
            change.add(empty, base)
            self.advance(2 * len(batch))
        return of_empty.of_kinds(), of_base.of_kinds()


@dataclass
class Sampled:
    """Samples per context and of the base, by seed groups; those of the strength curves; the empty context's change."""

    samples: dict[Context, list[Measurements]]
    base: list[Measurements]
    strengths: dict[str, dict[float, Measurements]]
    change: PixelChange


def sample_all(
    sampler: Sampler, concepts: ConceptSet, contexts: Sequence[Context], groups: Sequence[Sequence[int]]
) -> Sampled:
    """Sample contexts, the empty one and the single concepts among them, with a progress bar.

    `groups` are the seeds of each group; the strength curves take the first ones of the first group.
    """
    few = groups[0][:MAX_CURVE_SAMPLES]
    curves = {name: {s: Context({name: s}) for s in curve_strengths(name, contexts)} for name in concepts}
    between = [context for curve in curves.values() for context in curve.values() if context not in contexts]
    total = (len(contexts) + 1) * sum(map(len, groups)) + len(between) * len(few)
    change = PixelChange()
    others = [context for context in contexts if context]
    with ProgressBar(total=total, desc="sample", unit="image") as bar:
        sampler.advance = bar.update
        empty, base = sampler.empty_and_base(groups, change)
        drawn = iter(
            sampler.samples(
                [(context, group) for context in others for group in groups] + [(context, few) for context in between]
            )
        )
    samples = {Context(): empty} | {context: [next(drawn) for _ in groups] for context in others}
    first = {context: parts[0][: len(few)] for context, parts in samples.items()}
    first |= dict(zip(between, drawn, strict=True))
    strengths = {name: {s: first[context] for s, context in curve.items()} for name, curve in curves.items()}
    return Sampled(samples, base, strengths, change)


def curve_strengths(concept: str, contexts: Collection[Context]) -> list[float]:
    """Return the strengths of a concept's curve: the usual ones, and those at which it is sampled alone anyway."""
    own = {strength for c in contexts for strength in c.strengths.values() if c == Context({concept: strength})}
    return sorted({*STRENGTHS, *own})


@contextmanager
def adapters_disabled(*models: nn.Module) -> Iterator[None]:
    """Within the body the models are their bases; afterwards adapters are on, and trainable or not, as before."""
    modules = [module for model in models for module in model.modules()]
    layers = [module for module in modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    trainable = {parameter: parameter.requires_grad for model in models for parameter in model.parameters()}
    try:
        for layer in enabled:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in enabled:
            layer.enable_adapters(True)
        for parameter, value in trainable.items():
            parameter.requires_grad_(value)
