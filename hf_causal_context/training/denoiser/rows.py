"""Rows of a table as the denoiser's training reads them: images, or their latents, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets.config
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Array3D, Array4D, Dataset, Features
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...bases.diffusion_base import DiffusionBase
from ...bases.images import read_clip, read_image
from ...data.masks import plain_mask
from ...errors import UserValueError
from ...media.videos import files_of
from .buckets import Size

ENCODED_AT_ONCE = 16
_READING = 3  # goes up when some file is read in another way, so that no latents of the old way are found


@dataclass(frozen=True)
class Reader:
    """Rows with images -> the same rows with "clean" instead, the pixels (C, H, W) as uint8.

    With a number of frames, rows become clips (C, F, H, W), images of one frame.
    Where rows have a "mask", it becomes pixels (1, H, W), white where there is none.
    """

    content_column: str
    channels: int
    size: Size
    num_frames: int | None = None

    def __call__(self, row: Mapping[str, Any], flipped: bool = False) -> dict[str, Any]:
        """Read a row, mirrored or as it is.

        Raises:
            ValueError: what `read_image`, `read_clip` and `plain_mask` raise, and for a mask that is black where the
                image is used.
        """
        image = row[self.content_column]
        if self.num_frames is None:
            pixels = {"clean": read_image(image, self.channels, self.size)}
        else:
            pixels = {"clean": read_clip(image, self.size, self.num_frames)}
        if "mask" in row:
            pixels["mask"] = self._mask(row["mask"], image)
        if flipped:
            pixels = {name: np.ascontiguousarray(value[..., ::-1]) for name, value in pixels.items()}
        return {name: value for name, value in row.items() if name != self.content_column} | pixels

    def _mask(self, mask: Image.Image | None, image: Image.Image) -> NDArray[np.uint8]:
        if mask is None:
            return np.full((1, *self.size[::-1]), 255, np.uint8)
        pixels = read_image(plain_mask(mask, image), 1, self.size)
        if not pixels.any():
            raise UserValueError(
                f"the mask of {getattr(image, 'filename', '') or 'an image'} is white only where the image is cut off. "
                "Cut the image yourself, or remove it."
            )
        return pixels


def scaled_masks(masks: Tensor, clean: Tensor) -> Tensor:
    """Masks (B, 1, H, W) of pixels -> weights in [0, 1] of the size of what is trained on, means over its places."""
    return (
        masks if masks.is_floating_point() else F.adaptive_avg_pool2d(masks.float() / 255, cast(Any, clean.shape[2:]))
    )


def encode_rows(
    rows: Dataset, base: DiffusionBase, reader: Reader, device: torch.device, flipped: bool, encoder: str
) -> Dataset:
    """Return the rows with "clean", latents of their images, mirrored or not; what was computed once is found again.

    `encoder` is the `content_of` the base's autoencoder.
    """
    image_column = reader.content_column
    frames = () if reader.num_frames is None else (reader.num_frames,)
    blank = torch.zeros(1, base.image_channels, *frames, *reader.size[::-1])
    shape = tuple(base.encode_images(blank.to(device)).shape[1:])

    def encode(columns: dict[str, Any]) -> dict[str, Any]:
        shown = [dict(zip(images, values, strict=True)) for values in zip(*(columns[n] for n in images), strict=True)]
        read = stack([reader(row, flipped) for row in shown])
        latents = base.encode_images(read["clean"].to(device).float() / 127.5 - 1).float().cpu()
        masks = {"mask": scaled_masks(read["mask"], latents).numpy()} if "mask" in read else {}
        return {"clean": latents.numpy(), **masks}

    images = [image_column, *({"mask"} & {*rows.column_names})]
    kept = {name: feature for name, feature in rows.features.items() if name not in images}
    made: dict[str, Any] = {"clean": (Array4D if frames else Array3D)(shape, "float32")}
    if "mask" in images:
        made["mask"] = Array3D((1, *shape[1:]), "float32")
    # Named by what latents depend on, so that another run with the same base and images finds them.
    versions = (_READING, *(_file_versions(rows, column) for column in images))
    key = Hasher.hash((rows._fingerprint, images, versions, encoder, shape, flipped))
    folder = Path(datasets.config.HF_DATASETS_CACHE, "hf_causal_context")
    folder.mkdir(parents=True, exist_ok=True)
    encoded = rows.map(
        encode,
        batched=True,
        batch_size=ENCODED_AT_ONCE,
        remove_columns=images,
        features=Features(kept | made),
        new_fingerprint=key,
        cache_file_name=str(folder / f"latents-{key}.arrow"),  # datasets names one for rows from files only
        desc="encode mirrored images" if flipped else "encode images",
    )
    return encoded.with_format("torch", columns=list(made), output_all_columns=True)


@dataclass
class Bucket:
    """Rows that are read at one size.

    `numbers` are those of the rows. `latents` are the rows encoded, and then mirrored, where that is needed; nothing
    where images are read each time.
    """

    reader: Reader
    numbers: NDArray[np.int64]
    latents: list[Dataset] = field(default_factory=list)


class PreparedRows(torch.utils.data.Dataset):
    """Rows as they are trained on, followed by those that stand for combinations: others under a combination's name.

    They are asked for by keys, see `key`.

    Args:
        rows: images, with their contexts.
        buckets: which together have all of the rows.
        reweighted: combination -> the numbers of the rows that stand for it.
    """

    def __init__(self, rows: Dataset, buckets: Sequence[Bucket], reweighted: Mapping[str, NDArray[np.int64]]) -> None:
        self._rows, self._buckets = rows, buckets
        self._standing = np.concatenate([np.arange(len(rows)), *reweighted.values()])
        self._places = np.zeros((len(rows), 2), dtype=np.int64)
        for number, bucket in enumerate(buckets):
            self._places[bucket.numbers] = [(number, place) for place in range(len(bucket.numbers))]
        names = [name for name, numbers in reweighted.items() for _ in numbers]
        self.contexts: list[str] = [*rows.with_format(None)["context"], *names]  # else all images are read

    def __len__(self) -> int:
        return len(self._standing)

    @property
    def buckets(self) -> NDArray[np.int64]:
        """The number of each row's bucket."""
        return self._places[self._standing, 0]

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
        asked: defaultdict[tuple[int, bool], list[int]] = defaultdict(list)
        for number, flipped in chosen:
            asked[int(self._places[number, 0]), flipped].append(number)
        found: dict[tuple[int, bool], dict[str, Any]] = {}
        for (bucket, flipped), numbers in asked.items():
            read = self._read_alike(self._buckets[bucket], numbers, flipped)
            found |= {(number, flipped): row for number, row in zip(numbers, read, strict=True)}
        return [found[one] for one in chosen]

    def _read_alike(self, bucket: Bucket, numbers: list[int], flipped: bool) -> list[dict[str, Any]]:
        if bucket.latents:
            return cast(Any, bucket.latents[flipped]).__getitems__(self._places[numbers, 1].tolist())
        return [bucket.reader(row, flipped) for row in cast(Any, self._rows).__getitems__(numbers)]

    def _unreadable(self, chosen: Sequence[tuple[int, bool]]) -> str:
        """Return the first of these rows that cannot be read, by the name of its file where it has one."""
        for number, flipped in chosen:
            try:
                self._read([(number, flipped)])
            except Exception:  # see above
                path, bucket = None, self._buckets[self._places[number, 0]]
                if not bucket.latents:
                    path = undecoded(self._rows, bucket.reader.content_column)[number]["path"]
                return path or f"row {number} of the data"
        return f"one of the rows {[number for number, _ in chosen]} of the data"


def _file_versions(rows: Dataset, image_column: str) -> str:
    """Sizes and times of images that are files: the rows' fingerprint knows their paths only."""
    digest = hashlib.blake2b(digest_size=16)
    for image in undecoded(rows, image_column):
        for path in files_of(image) if image is not None else []:
            if path.exists():
                status = path.stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    return digest.hexdigest()


def undecoded(rows: Dataset, column: str) -> Any:
    """Return the images or clips of rows as they are stored, path and bytes."""
    plain = rows.with_format(None).select_columns([column])
    stored = type(plain.features[column])(decode=False)
    return plain.cast_column(column, stored)[column]


def content_of(model: torch.nn.Module) -> str:
    """Return a hash of a pretrained model's weights and configuration."""
    config = {name: value for name, value in cast(Any, model).config.items() if not name.startswith("_")}
    digest = hashlib.blake2b(repr(sorted(config.items())).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} ".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows -> their columns, "clean" and "mask" as one tensor each."""
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    for name in {"clean", "mask"} & columns.keys():
        values = columns[name]
        columns[name] = torch.stack([v if isinstance(v, Tensor) else torch.tensor(v) for v in values])
    return columns
