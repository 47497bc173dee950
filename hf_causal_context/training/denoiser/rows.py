"""Rows of a table as the denoiser's training reads them: images, or their latents, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Reader:
    """Rows with images -> the same rows with "clean" instead, the pixels (C, R, R) as uint8."""

    content_column: str
    channels: int
    resolution: int

    def __call__(self, row: Mapping[str, Any], flipped: bool = False) -> dict[str, Any]:
        """Read a row, mirrored or as it is."""
        pixels = read_image(row[self.content_column], self.channels, self.resolution)
        read = {name: value for name, value in row.items() if name != self.content_column}
        return read | {"clean": np.ascontiguousarray(pixels[..., ::-1]) if flipped else pixels}


def encode_rows(rows: Dataset, base: DiffusionBase, reader: Reader, device: torch.device, flipped: bool) -> Dataset:
    """Return the rows with "clean", latents of their images, mirrored or not; what was computed once is found again."""
    image_column = reader.content_column
    side = torch.zeros(1, base.image_channels, reader.resolution, reader.resolution)
    shape = tuple(base.encode_images(side.to(device)).shape[1:])

    def encode(columns: dict[str, Any]) -> dict[str, Any]:
        read = [reader({image_column: image}, flipped)["clean"] for image in columns[image_column]]
        pixels = torch.from_numpy(np.stack(read)).to(device)
        return {"clean": base.encode_images(pixels.float() / 127.5 - 1).float().cpu().numpy()}

    features = rows.features.copy()
    del features[image_column]
    # Named by what latents depend on, so that another run with the same base and images finds them.
    versions = (_READING, _file_versions(rows, image_column))
    key = Hasher.hash((rows._fingerprint, versions, _content(base.pipe.vae), shape, flipped))
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
        desc="encode mirrored images" if flipped else "encode images",
    )
    return encoded.with_format("torch", columns=["clean"], output_all_columns=True)


class PreparedRows(torch.utils.data.Dataset):
    """Rows as they are trained on, followed by those that stand for combinations: others under a combination's name.

    They are asked for by keys, see `key`.

    Args:
        rows: images, with their contexts.
        latents: the same rows encoded, and then mirrored, where that is needed; nothing where images are read each
            time.
        reweighted: combination -> the numbers of the rows that stand for it.
        reader: reads rows with images.
    """

    def __init__(
        self, rows: Dataset, latents: Sequence[Dataset], reweighted: Mapping[str, NDArray[np.int64]], reader: Reader
    ) -> None:
        self._rows, self._latents, self._reader = rows, latents, reader
        self._standing = np.concatenate([np.arange(len(rows)), *reweighted.values()])
        names = [name for name, numbers in reweighted.items() for _ in numbers]
        self.contexts: list[str] = [*rows.with_format(None)["context"], *names]  # else all images are read

    def __len__(self) -> int:
        return len(self._standing)

    def key(self, number: int, flipped: bool) -> int:
        """Return what a row is asked for by, as it is or mirrored."""
        return number + flipped * len(self)

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        asked = [(key % len(self), key >= len(self)) for key in keys]
        chosen = [(int(self._standing[number]), flipped) for number, flipped in asked]
        try:
            read = self._read(chosen)
        except Exception as error:  # decoders raise whatever they like, and seldom which file it was
            raise UserValueError(f"{self._unreadable(chosen)}: {error}") from error
        return [row | {"context": self.contexts[number]} for (number, _), row in zip(asked, read, strict=True)]

    def _read(self, chosen: Sequence[tuple[int, bool]]) -> list[dict[str, Any]]:
        if not self._latents:
            rows = cast(Any, self._rows).__getitems__([number for number, _ in chosen])
            return [self._reader(row, flipped) for row, (_, flipped) in zip(rows, chosen, strict=True)]
        found: dict[tuple[int, bool], dict[str, Any]] = {}
        for version, latents in enumerate(self._latents):
            numbers = [number for number, flipped in chosen if flipped == version]
            rows = cast(Any, latents).__getitems__(numbers) if numbers else []
            found |= {(number, bool(version)): row for number, row in zip(numbers, rows, strict=True)}
        return [found[one] for one in chosen]

    def _unreadable(self, chosen: Sequence[tuple[int, bool]]) -> str:
        """Return the first of these rows that cannot be read, by the name of its file where it has one."""
        for number, flipped in chosen:
            try:
                self._read([(number, flipped)])
            except Exception:  # see above
                path = None
                if not self._latents:
                    column = self._reader.content_column
                    undecoded = self._rows.with_format(None).cast_column(column, ImageFeature(decode=False))
                    path = undecoded[number][column]["path"]
                return path or f"row {number} of the data"
        return f"one of the rows {[number for number, _ in chosen]} of the data"


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


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows -> their columns, "clean" as one tensor."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    clean = [value if isinstance(value, Tensor) else torch.tensor(value) for value in columns["clean"]]
    return columns | {"clean": torch.stack(clean)}
