"""Interventional data -> the endless batches of one process, the same after a restart.

What a frozen base computes (latents, text embeddings) is computed once for map-style data. Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from ...bases.diffusion_base import DiffusionBase
from ...contexts import Context
from ...data import ContextSampler, InterventionalData, slots_of, stream_batches
from ...errors import UserValueError
from ...messages.progress import ProgressBar, say
from ..arguments import TrainingArguments
from ..few_rows import few_rows, joined, numbers_of_context
from ..loop.interruption import ignore_interruptions
from ..noise import Draws
from ..weights import batch_weights
from .buckets import BucketSampler, Size, bucket_sizes, nearest_bucket, told, upright_sizes
from .captions import changed_captions
from .checks import check_conditions, check_labels
from .class_images import CLASS_IMAGES, with_class_images
from .clips import clip_length
from .edits import BEGIN, Edits, Pairs, not_edited
from .flips import Flips
from .objectives import Batch
from .rows import ENCODED_AT_ONCE, Bucket, PreparedRows, Reader, content_of, encode_rows, scaled_masks, stack


class DenoiserBatches:
    """Batches for `DenoisingObjective`s: `batches(n)` yields the n-th and all that follow, on the device.

    Args:
        base: encodes images and captions.
        data: what to train on.
        arguments: batch size, seed, columns, resolution.
        num_batches: micro-batches of the whole run, per process.
        device: where batches go.
        rank, world_size: of this process.
        begun_steps: optimizer steps that the run was to have when it began; by default those of its batches.

    Raises:
        ValueError: for a base whose captions or classes the data lacks, or bad weights of contexts.
    """

    def __init__(
        self,
        base: DiffusionBase,
        data: InterventionalData,
        arguments: TrainingArguments,
        num_batches: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        begun_steps: int | None = None,
    ) -> None:
        self._base, self._data, self._arguments, self._device = base, data, arguments, device
        self._num_batches, self._rank, self._world_size = num_batches, rank, world_size
        self._resolution = arguments.resolution or base.default_resolution
        self._weights = batch_weights(data, arguments)
        contexts = (*data.contexts, *data.reweighted)
        self._masks = {context: data.concepts.mask([Context.parse(context)])[0] for context in contexts}
        self._captions: dict[str, dict[str, Tensor]] = {}
        check_conditions(base, data, arguments)
        self._frames = clip_length(base, data, arguments)
        if rank == 0 and base.takes_captions and not data.has_captions and not arguments.instance_prompt:
            print(
                "The data has no captions: the empty prompt is used. Caption the images (of a dataset: name the "
                "--caption_column), or caption all alike with --instance_prompt.",
                flush=True,
            )
        self._flips = Flips(arguments, data.concepts)
        self._reader = self._reader_of((self._resolution, self._resolution))
        self._buckets: list[Bucket] = []
        self._pairs: Pairs | None = None
        if isinstance(data.rows, Dataset):
            if data.has_pairs and (reason := not_edited(base, data, arguments)):
                if rank == 0:
                    say(reason)
            elif data.has_pairs:
                # A dry run measures the steps after its first, and most steps of the run have edits.
                accumulation = arguments.gradient_accumulation_steps
                steps = 1 if arguments.dry_run else int(BEGIN * (begun_steps or num_batches // accumulation))
                self._pairs = Pairs(data, arguments, steps * accumulation, self._weights)
                if rank == 0:
                    say(self._pairs.told(BEGIN if arguments.dry_run else steps * accumulation / num_batches))
            self._rows = rows = with_class_images(data, data.rows, arguments)
            if arguments.class_data_dir is not None:
                self._weights[CLASS_IMAGES] = arguments.prior_loss_weight
                self._masks[CLASS_IMAGES] = self._masks[""]
            self._buckets = self._make_buckets(rows)
            if arguments.dry_run:
                return  # nothing is computed ahead and kept
            if base.takes_captions and not (arguments.shuffle_tags or arguments.train_text_encoder):
                captioned = "caption" in rows.column_names
                captions = rows.unique("caption") if captioned else [arguments.instance_prompt]
                self._encode_captions({*captions, *([""] if arguments.caption_dropout else [])})
            if base.is_latent:
                self._keep_latents(rows)
            elif data.has_masks and rank == 0:  # else one that shows nothing would end the run at its step
                for number in ProgressBar(range(len(rows)), desc="look at masks"):
                    self._prepared.__getitems__([number])

    @cached_property
    def _prepared(self) -> PreparedRows:
        """The rows, and after them those that stand for combinations."""
        return PreparedRows(self._rows, self._buckets, self._data.reweighted)

    def _reader_of(self, size: Size) -> Reader:
        return Reader(self._data.content_column, self._base.image_channels, size, self._frames)

    def _make_buckets(self, rows: Dataset) -> list[Bucket]:
        if not self._arguments.aspect_ratio_buckets:
            return [Bucket(self._reader, np.arange(len(rows)))]
        sizes = bucket_sizes(self._resolution, self._base.size_multiple)
        nearest = np.array([nearest_bucket(size, sizes) for size in upright_sizes(rows, self._data.content_column)])
        used = [(sizes[number], np.flatnonzero(nearest == number)) for number in np.unique(nearest)]
        if self._rank == 0:
            say(told(used, rows["context"][:], self._arguments.train_batch_size * self._world_size))
        return [Bucket(self._reader_of(size), numbers) for size, numbers in used]

    def _keep_latents(self, rows: Dataset) -> None:
        encoder = content_of(self._base.pipe.vae)
        for bucket in self._buckets:
            own = rows if len(self._buckets) == 1 else rows.select(bucket.numbers)
            for flipped in (False, True)[: 1 + self._arguments.random_flip]:
                bucket.latents.append(encode_rows(own, self._base, bucket.reader, self._device, flipped, encoder))

    def __call__(self, start: int, num_observational: int = 0) -> Iterator[Batch]:
        """Batches from number `start` on; the first samples of the run are observational, as many as are given."""
        for number, columns in enumerate(self._loaded(start, num_observational), start):
            slots = self._slots(number)
            if self._arguments.caption_dropout or self._arguments.shuffle_tags:
                captions = self._captions_of(columns)
                changed = changed_captions(captions, slots, self._arguments)
                # The prompt of class images is all that tells them from the data.
                columns["caption"] = [
                    kept if context == CLASS_IMAGES else new
                    for context, kept, new in zip(columns["context"], captions, changed, strict=True)
                ]
            batch = self._to_batch(columns, Draws(self._arguments.seed, slots))
            if self._pairs is not None:
                batch.edits = self._edits(self._pairs, number)
                edited = 0 if batch.edits is None else len(batch.edits.slots)
                batch.weight = self._pairs.weight(number, len(slots), edited)
            yield batch

    def _edits(self, pairs: Pairs, number: int) -> Edits | None:
        """Return the pairs that are edited with the batch of this number, read as they are, not mirrored."""
        slots, numbers, partners = pairs.chosen(number, self._slots(number))
        if not slots:
            return None
        intervened, plain = (
            self._to_batch(stack(self._prepared.__getitems__(some)), Draws(self._arguments.seed, ()))
            for some in (numbers, partners)
        )
        seed = self._arguments.seed
        return Edits(plain.clean, intervened.clean, intervened.context, intervened.conditions, seed, slots)

    def _slots(self, number: int) -> range:
        return slots_of(number, self._arguments.train_batch_size, self._rank, self._world_size)

    def _loaded(self, start: int, num_observational: int) -> Iterator[dict[str, Any]]:
        """Columns of the batches from number `start` on."""
        size, seed, process = self._arguments.train_batch_size, self._arguments.seed, (self._rank, self._world_size)
        if self._data.streaming:
            stream = stream_batches(self._data, size, seed, start, *process, self._weights, num_observational)
            for number, read in enumerate(stream, start):
                flips = self._flips([row["context"] for row in read], self._slots(number))
                yield stack([self._reader(row, flipped) for row, flipped in zip(read, flips, strict=True)])
            return
        rows = self._prepared
        how = (rows.contexts, size, seed, self._num_batches, start, *process, self._weights, num_observational)
        in_buckets = self._arguments.aspect_ratio_buckets
        sampler = BucketSampler(rows.buckets, *how) if in_buckets else ContextSampler(*how)
        yield from DataLoader(
            rows,
            batch_sampler=_Keys(sampler, rows, self._flips),
            collate_fn=stack,
            num_workers=self._arguments.dataloader_num_workers,
            worker_init_fn=ignore_interruptions,
            generator=torch.Generator(),  # else it draws from the random state that a checkpoint restored
            pin_memory=self._device.type == "cuda",
        )

    def few(self, context: str, num: int) -> Batch:
        """Up to `num` rows of a context, trained on or held out, on the CPU: the same ones whenever they are asked for.

        Raises:
            ValueError: for a stream without rows of the context.
        """
        seed = self._arguments.seed
        buckets = self._buckets
        # In buckets, rows have several shapes: they are measured as squares.
        if len(buckets) != 1 or not buckets[0].latents or context in self._data.held_out:
            rows = [self._reader(cast(Any, row)) for row in few_rows(self._data, context, num, seed)]
            parts = [rows[start : start + ENCODED_AT_ONCE] for start in range(0, len(rows), ENCODED_AT_ONCE)]
        else:
            latents = buckets[0].latents[0]
            parts = [cast(Any, latents).__getitems__(numbers_of_context(latents, context, num, seed))]
        encoded = [self._to_batch(stack(part), Draws(seed, ())) for part in parts]
        if not encoded:
            raise UserValueError(
                f"The stream has no rows of the context {context or self._arguments.observational_name!r}. Add them, "
                "or leave the context out."
            )
        return joined(encoded, self._base)

    def _to_batch(self, columns: dict[str, Any], draws: Draws) -> Batch:
        clean = columns["clean"].to(self._device, non_blocking=True)
        if clean.dtype == torch.uint8:
            clean = self._base.encode_images(clean.float() / 127.5 - 1).to(self._device)
        context = torch.stack([self._mask(c) for c in columns["context"]]).to(self._device, non_blocking=True)
        mask = columns.get("mask")
        if mask is not None:
            mask = scaled_masks(mask.to(self._device, non_blocking=True), clean)
        apart = None
        if self._arguments.class_data_dir is not None:
            apart = torch.tensor([name == CLASS_IMAGES for name in columns["context"]], device=self._device)
        if self._arguments.train_text_encoder:  # which encodes them in each step
            return Batch(clean, context, {}, draws, mask, self._captions_of(columns), apart)
        return Batch(clean, context, self._conditions(columns), draws, mask, apart=apart)

    def _mask(self, context: str) -> Tensor:
        if context not in self._masks:
            self._masks[context] = self._data.concepts.mask([Context.parse(context)])[0]
        return self._masks[context]

    def _captions_of(self, columns: dict[str, Any]) -> list[str]:
        captions = columns.get("caption") or [self._arguments.instance_prompt] * len(columns["context"])
        for context, caption in zip(columns["context"], captions, strict=True):
            if caption is None:  # in a stream, of which the first rows alone were checked
                name = context or self._arguments.observational_name
                raise UserValueError(f"A row of the context {name!r} has no caption. Write one, '' for none.")
        return captions

    def _conditions(self, columns: dict[str, Any]) -> dict[str, Tensor]:
        if self._arguments.class_column:
            if self._data.streaming:  # else all are checked before
                check_labels(self._base, columns[self._arguments.class_column], self._arguments.class_column)
            labels = torch.as_tensor(columns[self._arguments.class_column])
            return {"class_labels": labels.to(self._device)}
        if not self._base.takes_captions:
            return {}
        captions = self._captions_of(columns)
        if self._arguments.shuffle_tags or (self._data.streaming and self._data.has_captions):
            self._captions = {}  # there are more than memory holds, and a resumed run would have kept others
        self._encode_captions(set(captions).difference(self._captions))
        conditions = self._base.join_conditions([self._captions[caption] for caption in captions])
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in conditions.items()}

    def _encode_captions(self, captions: Iterable[str]) -> None:
        pending = sorted(captions)
        bar = ProgressBar(range(0, len(pending), ENCODED_AT_ONCE), desc="encode captions")
        for start in bar:
            some = pending[start : start + ENCODED_AT_ONCE]
            encoded = {name: tensor.cpu() for name, tensor in self._base.encode_captions(some).items()}
            for i, caption in enumerate(some):
                self._captions[caption] = {name: tensor[i] for name, tensor in encoded.items()}


@dataclass
class _Keys:
    """The keys of a sampler's rows: whether a row is mirrored is a matter of its slot."""

    sampler: ContextSampler | BucketSampler
    rows: PreparedRows
    flips: Flips

    def __iter__(self) -> Iterator[list[int]]:
        for batch, numbers in enumerate(self.sampler, self.sampler.start):
            flips = self.flips([self.rows.contexts[number] for number in numbers], self.sampler.slots(batch))
            yield [self.rows.key(number, flipped) for number, flipped in zip(numbers, flips, strict=True)]
