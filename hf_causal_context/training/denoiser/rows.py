"""Rows of a table as the denoiser's training reads them: images, or their latents, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
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

from ...bases.diffusion_base import DiffusionBase
from ...bases.images import read_image
from ...errors import UserValueError

ENCODED_AT_ONCE = 16
_READING = 2  # goes up when `read_image` reads some file in another way, so that no latents of the old way are found


def image_reader(base: DiffusionBase, resolution: int) -> partial[np.ndarray]:
    """Return what reads an image as a base takes it."""
    return partial(read_image, channels=base.image_channels, resolution=resolution)


def prepare_rows(
    rows: Dataset, base: DiffusionBase, image_column: str, resolution: int, device: torch.device
) -> Dataset:
    """Return the rows with "clean" instead of their images: pixels, read when they are used, or latents, read now."""
    read = image_reader(base, resolution)
    if not base.is_latent:
        return rows.with_transform(partial(_read_rows, image_column=image_column, read=read))
    side = torch.zeros(1, base.image_channels, resolution, resolution)
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
        batch_size=ENCODED_AT_ONCE,
        remove_columns=image_column,
        features=Features(features | {"clean": Array3D(shape, "float32")}),
        new_fingerprint=key,
        cache_file_name=str(folder / f"latents-{key}.arrow"),  # datasets names one for rows from files only
        desc="encode images",
    )
    return encoded.with_format("torch", columns=["clean"], output_all_columns=True)


class PreparedRows(torch.utils.data.Dataset):
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


def collate(rows: list[dict[str, Any]], image_column: str, read: partial[np.ndarray]) -> dict[str, Any]:
    """Rows with images -> their columns, the images as pixels."""
    return stack([row | {"clean": read(row[image_column])} for row in rows])


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Prepared rows -> their columns."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    clean = [value if isinstance(value, Tensor) else torch.tensor(value) for value in columns["clean"]]
    return columns | {"clean": torch.stack(clean)}
