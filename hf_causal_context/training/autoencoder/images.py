"""Images kept whole in the memory of the training device, as bytes, and the endless batches made from them.

Shapes: N rows, B samples, C channels, S x S pixels, K concepts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from ...bases.images import read_image
from ...contexts import ConceptSet, Context, ContextLike, as_context
from ...data import ContextSampler, InterventionalData, slots_of
from ...errors import UserTypeError, UserValueError
from ...messages.progress import ProgressBar
from ...messages.wording import quoted
from ..noise import generator_of
from ..weights import parse_weights
from .arguments import AutoencoderArguments
from .objective import ImageBatch


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, S, S), uint8, with the context of every row, kept in its printed form ("" is observational).

    Raises:
        ValueError: for images of another type or shape, a number of contexts that differs, or unknown concepts.
    """

    images: Tensor
    contexts: NDArray[np.object_]
    concepts: ConceptSet

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or len(self.images) != len(self.contexts):
            raise UserValueError(
                f"Images of shape {tuple(self.images.shape)} and dtype {self.images.dtype} with "
                f"{len(self.contexts)} contexts. They must be bytes (rows, channels, side, side), 0 to 255, and have "
                "one context each."
            )
        printed = {context: str(as_context(context)) for context in set(self.contexts)}  # "b+a" is "a+b"
        object.__setattr__(self, "contexts", np.array([printed[c] for c in self.contexts], dtype=object))
        self.concepts.mask([Context.parse(context) for context in self.names])  # refuses unknown concepts

    @classmethod
    def of_arrays(cls, arrays: Mapping[Context, NDArray[np.uint8]], concepts: ConceptSet) -> ImageSet:
        """From one array (n, C, S, S) for each context.

        Raises:
            ValueError: for no arrays, or arrays of several shapes, and see the class.
        """
        shapes = {array.shape[1:] for array in arrays.values()}
        if len(shapes) != 1:
            raise UserValueError(
                f"The arrays of {len(arrays)} contexts hold images of the shapes {sorted(shapes)}. Give one array or "
                "more, (images, channels, side, side), all of one shape."
            )
        names = [str(context) for context in arrays]
        contexts = np.repeat(np.array(names, dtype=object), [len(array) for array in arrays.values()])
        return cls(torch.from_numpy(np.concatenate(list(arrays.values()))), contexts, concepts)

    @classmethod
    def of_data(cls, data: InterventionalData, size: int, channels: int) -> ImageSet:
        """Return the rows to train on, resized and cut to the middle square.

        Raises:
            TypeError: for a stream.
        """
        if not isinstance(data.rows, Dataset):
            raise UserTypeError("A stream cannot be kept in memory. Load the data with streaming=False.")
        rows = data.rows.select_columns([data.content_column, "context"])
        images = np.empty((len(rows), channels, size, size), dtype=np.uint8)
        for i, row in enumerate(ProgressBar(rows, desc="read images")):
            images[i] = read_image(cast(Any, row)[data.content_column], channels, size)
        contexts = np.array(rows["context"][:], dtype=object)
        return cls(torch.from_numpy(images), contexts, data.concepts)

    @property
    def names(self) -> tuple[str, ...]:
        """The contexts that there are rows of, sorted."""
        return tuple(sorted(set(self.contexts)))

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each context."""
        return {name: int((self.contexts == name).sum()) for name in self.names}

    @property
    def digest(self) -> str:
        """Of the images and their contexts, in their order."""
        result = hashlib.blake2b(repr((self.images.shape, list(self.contexts))).encode(), digest_size=16)
        result.update(self.images.contiguous().numpy().data)
        return result.hexdigest()

    def masks(self) -> Tensor:
        """Return the intervention mask of every row, (N, K)."""
        names, codes = np.unique(self.contexts.astype(str), return_inverse=True)
        return self.concepts.mask([Context.parse(name) for name in names])[torch.from_numpy(codes)]

    def of(self, context: ContextLike) -> Tensor:
        """Return the images of one context, (n, C, S, S), uint8.

        Raises:
            ValueError: for a context without rows.
        """
        name = str(as_context(context))
        rows = np.flatnonzero(self.contexts == name)
        if not len(rows):
            raise UserValueError(f"The context {name!r} has no images. There are: {quoted(self.names)} ('' is obs).")
        return self.images[torch.from_numpy(rows)]

    def select(self, rows: NDArray[np.int64]) -> ImageSet:
        """Return some of the rows, by number."""
        return ImageSet(self.images[torch.from_numpy(rows)], self.contexts[rows], self.concepts)

    def split(self, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """Two sets: all but `fraction` of the rows of each context, and the others, chosen at random.

        Raises:
            ValueError: for a context that would have no rows in one of the sets.
        """
        generator = np.random.default_rng(seed)
        first, second = [], []
        for name in self.names:
            rows = generator.permutation(np.flatnonzero(self.contexts == name))
            kept = round(len(rows) * (1 - fraction))
            if not 0 < kept < len(rows):
                raise UserValueError(
                    f"The context {name!r} has {len(rows)} rows, too few to keep {fraction:g} of them for validation. "
                    "Add rows, or change --validation_fraction."
                )
            first.append(rows[:kept])
            second.append(rows[kept:])
        return self.select(np.sort(np.concatenate(first))), self.select(np.sort(np.concatenate(second)))


class ImageBatches:
    """Batches for an `AutoencoderObjective`: `batches(n)` yields the n-th and all that follow, on the device.

    Rows are drawn as `ContextSampler` says: contexts mixed within every batch, whatever the number of processes; in
    published runs every batch holds one context, and contexts take turns. The noise of a batch comes from a generator
    of its own, so that it is the same in a resumed run.

    Args:
        images: what to train on; moved to the device as bytes.
        arguments: batch size, seed, weights of contexts.
        num_batches: micro-batches of the whole run, per process.
        device: where batches go.
        rank, world_size: of this process.

    Raises:
        ValueError: for bad weights of contexts.
    """

    def __init__(
        self,
        images: ImageSet,
        arguments: AutoencoderArguments,
        num_batches: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._images = images.images.to(device, memory_format=torch.channels_last)
        self._masks = images.masks().to(device)
        self._contexts, self._seed, self._device = images.contexts, arguments.seed, device
        self._published = arguments.published
        self._num_batches, self._batch_size = num_batches, arguments.train_batch_size
        self._rank, self._world_size = rank, world_size
        self._weights = parse_weights(arguments.context_weights, arguments.observational_name)
        self._sampler(0)  # refuses bad weights

    def __call__(self, start: int) -> Iterator[ImageBatch]:
        """Batches from number `start` on."""
        batches = self._of_one_context(start) if self._published else iter(self._sampler(start))
        for number, rows in enumerate(batches, start):
            chosen = torch.as_tensor(rows, device=self._device)
            generator = generator_of(self._seed, number, self._rank, device=self._device)
            yield ImageBatch(to_floats(self._images[chosen]), self._masks[chosen], generator)

    def _of_one_context(self, start: int) -> Iterator[NDArray[np.int64]]:
        rows = [np.flatnonzero(self._contexts == name) for name in sorted(set(self._contexts))]
        samplers = [
            ContextSampler(self._contexts[own], self._batch_size, self._seed + i, self._num_batches)
            for i, own in enumerate(rows)
        ]
        # Where each process would meet some contexts only, which its batch norm then knew alone, they move on in turns.
        together = math.lcm(self._world_size, len(rows))
        moves = together < self._world_size * len(rows)
        for number in range(start, self._num_batches):
            place = number * self._world_size + self._rank
            turn, context = divmod(place, len(rows))
            context = (context + moves * (place // together)) % len(rows)
            yield rows[context][samplers[context].rows(slots_of(turn, self._batch_size))]

    def _sampler(self, start: int) -> ContextSampler:
        return ContextSampler(
            self._contexts,
            self._batch_size,
            self._seed,
            self._num_batches,
            start,
            self._rank,
            self._world_size,
            self._weights,
        )


def to_floats(images: Tensor) -> Tensor:
    """Bytes -> float32 in [0, 1]."""
    return images.float().div_(255)
