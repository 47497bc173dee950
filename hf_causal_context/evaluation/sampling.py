"""Samples of an adapter and of its base from the same seeds, read as they are made.

Shapes: N images (N, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm

from ..bases.diffusion_base import DiffusionBase
from ..contexts import ConceptSet, Context
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


@dataclass
class Sampler:
    """Draws and reads samples in batches.

    Attributes:
        base: the pipeline with the adapter attached.
        draw: context, seeds -> images; `generate` with everything else settled.
        read: what is kept of them.
        batch_size: images per call.
        advance: told the number of images after every call.
    """

    base: DiffusionBase
    draw: Callable[[Context, Sequence[int]], Tensor]
    read: Reader
    batch_size: int
    advance: Callable[[int], object] = lambda num: None

    def samples(self, context: Context, seeds: Sequence[int]) -> Measurements:
        """Readings of one context.

        Raises:
            ValueError: for images that are not finite.
        """
        return Measurements.cat(
            [self._read(self.draw(context, part), context, not i) for i, part in self._parts(seeds)]
        )

    def empty_and_base(self, seeds: Sequence[int], change: PixelChange) -> tuple[Measurements, Measurements]:
        """Readings of the empty context, and of the base without its adapter; `change` takes in their difference.

        Raises:
            ValueError: for images that are not finite.
        """
        of_empty, of_base = [], []
        for i, part in self._parts(seeds):
            empty = self.draw(Context(), part)
            of_empty.append(self._read(empty, Context(), not i))
            with adapters_disabled(self.base.denoiser):
                base = self.draw(Context(), part)
            self.advance(len(part))
            of_base.append(self.read(base, "Samples of the base", 0))
            change.add(empty, base)
        return Measurements.cat(of_empty), Measurements.cat(of_base)

    def _parts(self, seeds: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        for start in range(0, len(seeds), self.batch_size):
            yield start, seeds[start : start + self.batch_size]

    def _read(self, images: Tensor, context: Context, first: bool) -> Measurements:
        self.advance(len(images))
        where = f"Samples of context {str(context) or '(observational)'!r}"
        return self.read(images, where, NUM_EXAMPLES if first else 0)


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
    between = [strength for strength in STRENGTHS if strength not in (0, 1)]
    total = (len(contexts) + 1) * sum(map(len, groups)) + len(concepts) * len(between) * len(few)
    change = PixelChange()
    with tqdm(total=total, desc="sample", unit="image") as bar:
        sampler.advance = bar.update
        pairs = [sampler.empty_and_base(group, change) for group in groups]
        samples = {Context(): [empty for empty, _ in pairs]}
        for context in contexts:
            if context:
                samples[context] = [sampler.samples(context, group) for group in groups]
        strengths: dict[str, dict[float, Measurements]] = {name: {} for name in concepts}
        for name, curve in strengths.items():
            for strength in STRENGTHS:
                context = Context({name: strength})
                known = samples[context][0][: len(few)] if strength in (0, 1) else None
                curve[strength] = known or sampler.samples(context, few)
    return Sampled(samples, [of_base for _, of_base in pairs], strengths, change)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the body the model is its base; afterwards its adapters are on, and trainable or not, as before."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    enabled = [layer for layer in layers if not layer.disable_adapters]
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for layer in enabled:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in enabled:
            layer.enable_adapters(True)
        for parameter, value in trainable.items():
            parameter.requires_grad_(value)
