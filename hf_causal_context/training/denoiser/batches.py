"""Interventional data -> the endless batches of one process, the same after a restart.

What a frozen base computes (latents, text embeddings) is computed once for map-style data. Shapes: B samples.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets.config
import numpy as np
import torch
from datasets import Array3D, Dataset, Features
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...bases.diffusion_base import DiffusionBase
from ...bases.images import read_image
from ...contexts import Context
from ...data import ContextSampler, InterventionalData, slots_of, stream_batches
from ...errors import UserValueError
from ..arguments import TrainingArguments
from ..few_rows import few_rows, joined, numbers_of_context
from ..loop.interruption import ignore_interruptions
from ..noise import Draws
from ..weights import batch_weights
from .objectives import Batch

_ENCODED_AT_ONCE = 16
_READING = 2  # goes up when `read_image` reads some file in another way, so that no latents of the old way are found


class DenoiserBatches:
    """Batches for `DenoisingObjective`s: `batches(n)` yields the n-th and all that follow, on the device.

    Args:
        base: encodes images and captions.
        data: what to train on.
        arguments: batch size, seed, columns, resolution.
        num_batches: micro-batches of the whole run, per process.
        device: where batches go.
        rank, world_size: of this process.

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
    ) -> None:
        self._base, self._data, self._arguments, self._device = base, data, arguments, device
        self._num_batches, self._rank, self._world_size = num_batches, rank, world_size
        self._resolution = arguments.resolution or base.default_resolution
        self._weights = batch_weights(data, arguments)
        contexts = (*data.contexts, *data.reweighted)
        self._masks = {context: data.concepts.mask([Context.parse(context)])[0] for context in contexts}
        self._captions: dict[str, dict[str, Tensor]] = {}
        self._check_conditions()
        self._rows: Dataset | None = None
        if isinstance(data.rows, Dataset):
            self._rows = self._prepare(data.rows)

    def __call__(self, start: int, num_observational: int = 0) -> Iterator[Batch]:
        """Batches from number `start` on; the first samples of the run are observational, as many as are given."""
        seed, size = self._arguments.seed, self._arguments.train_batch_size
        process = (self._rank, self._world_size)
        if self._rows is None:
            rows = stream_batches(self._data, size, seed, start, *process, self._weights, num_observational)
            collate = partial(_collate, image_column=self._data.content_column, read=self._reader())
            loaded: Iterable[dict[str, Any]] = map(collate, rows)
        else:
            rows = _Rows(self._rows, self._data.reweighted, self._data.content_column)
            sampler = ContextSampler(
                rows.contexts,
                size,
                seed,
                self._num_batches,
                start,
                *process,
                self._weights,
                num_observational,
            )
            loaded = DataLoader(
                rows,
                batch_sampler=sampler,
                collate_fn=_stack,
                num_workers=self._arguments.dataloader_num_workers,
                worker_init_fn=ignore_interruptions,
                generator=torch.Generator(),  # else it draws from the random state that a checkpoint restored
                pin_memory=self._device.type == "cuda",
            )
        for number, columns in enumerate(loaded, start):
            yield self._to_batch(columns, Draws(seed, slots_of(number, size, *process)))

    def few(self, context: str, num: int) -> Batch:
        """Up to `num` rows of a context, trained on or held out, on the CPU: the same ones whenever they are asked for.

        Raises:
            ValueError: for a stream without rows of the context.
        """
        seed, content = self._arguments.seed, self._data.content_column
        if self._rows is None or context in self._data.held_out:
            rows = list(few_rows(self._data, context, num, seed))
            parts = [rows[start : start + _ENCODED_AT_ONCE] for start in range(0, len(rows), _ENCODED_AT_ONCE)]
            encoded = [self._to_batch(_collate(part, content, self._reader()), Draws(seed, ()), True) for part in parts]
        else:
            numbers = numbers_of_context(self._rows, context, num, seed)
            encoded = [self._to_batch(_stack(cast(Any, self._rows).__getitems__(numbers)), Draws(seed, ()))]
        if not encoded:
            raise UserValueError(
                f"The stream has no rows of the context {context or self._arguments.observational_name!r}. Add them, "
                "or leave the context out."
            )
        return joined(encoded, self._base)

    def _to_batch(self, columns: dict[str, Any], draws: Draws, encode: bool = False) -> Batch:
        clean = columns["clean"].to(self._device, non_blocking=True)
        if clean.dtype == torch.uint8:
            clean = clean.float() / 127.5 - 1
            if encode or self._rows is None:
                clean = self._base.encode_images(clean)
        context = torch.stack([self._mask(c) for c in columns["context"]]).to(self._device, non_blocking=True)
        if self._arguments.train_text_encoder:  # which encodes them in each step
            captions = columns.get("caption") or [self._arguments.instance_prompt] * len(clean)
            return Batch(clean, context, {}, draws, captions)
        return Batch(clean, context, self._conditions(columns, len(clean)), draws)

    def _mask(self, context: str) -> Tensor:
        if context not in self._masks:
            self._masks[context] = self._data.concepts.mask([Context.parse(context)])[0]
        return self._masks[context]

    def _conditions(self, columns: dict[str, Any], rows: int) -> dict[str, Tensor]:
        if self._arguments.class_column:
            labels = torch.as_tensor(columns[self._arguments.class_column])
            return {"class_labels": labels.to(self._device)}
        if not self._base.takes_captions:
            return {}
        captions = columns.get("caption") or [self._arguments.instance_prompt] * rows
        if self._rows is None and self._data.has_captions:
            self._captions = {}  # a stream has more than memory holds, and a resumed run would have kept others
        self._encode_captions(set(captions).difference(self._captions))
        conditions = self._base.join_conditions([self._captions[caption] for caption in captions])
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in conditions.items()}

    def _encode_captions(self, captions: Iterable[str]) -> None:
        pending = sorted(captions)
        bar = tqdm(range(0, len(pending), _ENCODED_AT_ONCE), desc="encode captions", disable=len(pending) < 200)
        for start in bar:
            some = pending[start : start + _ENCODED_AT_ONCE]
            encoded = {name: tensor.cpu() for name, tensor in self._base.encode_captions(some).items()}
            for i, caption in enumerate(some):
                self._captions[caption] = {name: tensor[i] for name, tensor in encoded.items()}

    def _reader(self) -> partial[np.ndarray]:
        return partial(read_image, channels=self._base.image_channels, resolution=self._resolution)

    def _prepare(self, rows: Dataset) -> Dataset:
        read, image_column = self._reader(), self._data.content_column
        if self._base.takes_captions and "caption" in rows.column_names and not self._arguments.train_text_encoder:
            self._encode_captions(rows.unique("caption"))
        if not self._base.is_latent:
            return rows.with_transform(partial(_read_rows, image_column=image_column, read=read))
        base, device = self._base, self._device
        side = torch.zeros(1, base.image_channels, self._resolution, self._resolution)
        shape = tuple(base.encode_images(side.to(device)).shape[1:])

        def encode(columns: dict[str, Any]) -> dict[str, Any]:
            pixels = torch.from_numpy(np.stack([read(image) for image in columns[image_column]]))
            return {"clean": base.encode_images(pixels.to(device).float() / 127.5 - 1).float().cpu().numpy()}

        features = rows.features.copy()
        del features[image_column]
        # Named by what latents depend on, so that another run with the same base and images finds them.
        versions = (_READING, _file_versions(rows, image_column))
        key = Hasher.hash((rows._fingerprint, versions, _content(base.pipe.vae), shape))
        folder = Path(datasets.config.HF_DATASETS_CACHE, "hf_causal_context")
        folder.mkdir(parents=True, exist_ok=True)
        encoded = rows.map(
            encode,
            batched=True,
            batch_size=_ENCODED_AT_ONCE,
            remove_columns=image_column,
            features=Features(features | {"clean": Array3D(shape, "float32")}),
            new_fingerprint=key,
            cache_file_name=str(folder / f"latents-{key}.arrow"),  # datasets names one for rows from files only
            desc="encode images",
        )
        return encoded.with_format("torch", columns=["clean"], output_all_columns=True)

    def _check_conditions(self) -> None:
        base, column = self._base, self._arguments.class_column
        name = type(base.pipe).__name__
        feature = (self._data.rows.features or {}).get(self._data.content_column)
        if feature is not None and not isinstance(feature, ImageFeature):
            raise UserValueError(
                f"The column {self._data.content_column!r} holds {feature}, not images. Name another "
                "--image_column, or cast it: dataset.cast_column(name, datasets.Image())."
            )
        columns = self._data.rows.column_names or []
        if base.takes_classes and (column is None or column not in columns):
            raise UserValueError(
                f"This {name} is conditioned on classes, but --class_column={column} names no column of the data. It "
                f"has: {', '.join(columns)}."
            )
        if column is not None and not base.takes_classes:
            raise UserValueError(f"--class_column={column} was given, but this {name} takes no classes. Leave it out.")
        for argument in ("instance_prompt", "validation_prompt"):
            if (text := getattr(self._arguments, argument)) and not base.takes_captions:
                raise UserValueError(f"--{argument}={text!r} was given, but {name} takes no captions. Leave it out.")
        if self._data.has_captions and not base.takes_captions:
            raise UserValueError(f"The data has captions, but {name} takes none. Leave --caption_column or them out.")
        prompt = self._arguments.instance_prompt
        if self._data.has_captions and prompt:
            raise UserValueError(
                f"--instance_prompt={prompt!r} captions images that have no captions, but the data has some. Leave one "
                "of the two out."
            )
        if base.takes_captions and not self._data.has_captions and not prompt and self._rank == 0:
            print(
                "The data has no captions: the empty prompt is used. Caption the images (of a dataset: name the "
                "--caption_column), or caption all alike with --instance_prompt.",
                flush=True,
            )


class _Rows(torch.utils.data.Dataset):
    """Prepared rows, followed by those that stand for combinations: other rows under the combination's name."""

    def __init__(self, rows: Dataset, reweighted: Mapping[str, NDArray[np.int64]], content_column: str) -> None:
        self._rows, self._content_column = rows, content_column
        self._standing = np.concatenate([np.arange(len(rows)), *reweighted.values()])
        names = [name for name, numbers in reweighted.items() for _ in numbers]
        self.contexts: list[str] = [*rows.with_format(None)["context"], *names]  # else all images are read

    def __len__(self) -> int:
        return len(self._standing)

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        chosen = self._standing[numbers].tolist()
        try:
            rows = cast(Any, self._rows).__getitems__(chosen)
        except Exception as error:  # decoders raise whatever they like, and seldom which file it was
            raise UserValueError(f"{self._unreadable(chosen)}: {error}") from error
        return [row | {"context": self.contexts[number]} for number, row in zip(numbers, rows, strict=True)]

    def _unreadable(self, numbers: list[int]) -> str:
        """Return the first of these rows that cannot be read, by the name of its file where it has one."""
        for number in numbers:
            try:
                self._rows[number]
            except Exception:  # see above
                path = None
                if self._content_column in self._rows.column_names:  # else it was encoded before
                    undecoded = self._rows.with_format(None).cast_column(
                        self._content_column, ImageFeature(decode=False)
                    )
                    path = undecoded[number][self._content_column]["path"]
                return path or f"row {number} of the data"
        return f"one of the rows {numbers} of the data"


def _file_versions(rows: Dataset, image_column: str) -> str:
    """Sizes and times of images that are files: the rows' fingerprint knows their paths only."""
    digest = hashlib.blake2b(digest_size=16)
    images = rows.with_format(None).select_columns([image_column])
    for image in images.cast_column(image_column, ImageFeature(decode=False))[image_column]:
        if image is not None and image["bytes"] is None and os.path.exists(image["path"]):
            status = os.stat(image["path"])
            digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    return digest.hexdigest()


def _content(model: torch.nn.Module) -> str:
    """Return a hash of a pretrained model's weights and configuration."""
    config = {name: value for name, value in cast(Any, model).config.items() if not name.startswith("_")}
    digest = hashlib.blake2b(repr(sorted(config.items())).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} ".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_rows(columns: dict[str, Any], image_column: str, read: partial[np.ndarray]) -> dict[str, Any]:
    images = columns.pop(image_column)
    return columns | {"clean": [read(image) for image in images]}


def _collate(rows: list[dict[str, Any]], image_column: str, read: partial[np.ndarray]) -> dict[str, Any]:
    return _stack([row | {"clean": read(row[image_column])} for row in rows])


def _stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    clean = [value if isinstance(value, Tensor) else torch.tensor(value) for value in columns["clean"]]
    return columns | {"clean": torch.stack(clean)}
