"""What a frozen denoiser sees in images, as vectors: inputs for the density ratios of reweighting.

Shapes: N images, B batch, C channels, H x W pixels, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..._random import seeded
from ...bases.diffusion_base import DiffusionBase
from ...bases.images import read_image
from ...errors import UserValueError
from ...inference.sampling import eval_mode
from ...messages.progress import ProgressBar
from ..bare_model import BareModel

NUM_FEATURES = 128
_NOISE_LEVEL = 0.02  # the time step at which clean images are shown, as a share of all
_MOST_OUTPUTS = 8192  # kept per image, before principal components
_LARGEST_SIDE = 256
_BATCH_SIZE = 32


@torch.no_grad()
def denoiser_features(base: DiffusionBase, images: Sequence[Image.Image], resolution: int) -> Tensor:
    """Principal components (N, at most 128) of what an early and the middle block of the denoiser put out.

    Each is divided by the root of its deviation. Images are shown as they are, at a time step of little noise, and
    without a caption. Bases in half precision need autocast.

    Args:
        base: the pipeline; images go to its device. An adapter on its denoiser does nothing.
        images: anything with a length that yields images.
        resolution: side of the images in training; they are read at no more than 256 pixels where the base allows.

    Raises:
        ValueError: where the base overflows.
    """
    device = next(base.denoiser.parameters()).device
    model = cast(nn.Module, BareModel(base.denoiser))
    if not base.fixed_size:
        resolution = min(resolution, _LARGEST_SIDE // base.size_multiple * base.size_multiple)
    time = int(_NOISE_LEVEL * base.num_train_timesteps)
    features = []
    conditions = _conditions(base)
    with eval_mode(base.denoiser), _watched_blocks(base) as seen:
        for batch in ProgressBar(_batches(images), desc="look at images", total=-(-len(images) // _BATCH_SIZE)):
            read = [torch.tensor(read_image(image, base.image_channels, resolution)) for image in batch]
            clean = base.encode_images(torch.stack(read).to(device).float() / 127.5 - 1)
            times = torch.full((len(batch),), time, device=device)
            if base.prediction == "flow":
                times = times.float()
            repeated = {name: row.repeat_interleave(len(batch), 0) for name, row in conditions.items()}
            try:
                base.predict(model, clean, times, repeated, None)
            except _SeenEnough:
                features.append(_pooled(list(seen.values())).cpu())
            seen.clear()
    with torch.autocast("cpu", enabled=False):
        return principal_components(torch.cat(features))


def principal_components(features: Tensor) -> Tensor:
    """Features (N, D) -> (N, at most 128), each component divided by the root of its deviation.

    Raises:
        ValueError: for features that are not finite.
    """
    if num_bad := int((~features.isfinite()).any(1).sum()):
        raise UserValueError(
            f"What the base sees in {num_bad} of {len(features)} samples is not finite. Where it overflows in half "
            "precision, give --mixed_precision bf16 or no; else look whether its weights are whole."
        )
    centered = features - features.mean(0)
    centered = centered / centered.std(0).clamp(min=1e-6)
    with seeded(0):
        _, _, directions = torch.pca_lowrank(centered, q=min(NUM_FEATURES, *centered.shape), center=False, niter=3)
    projected = centered @ directions
    return projected / projected.std(0).clamp(min=1e-6).sqrt()


class _SeenEnough(Exception):  # noqa: N818 (no error)
    """The last watched block has run; what follows it is not needed."""


@contextmanager
def _watched_blocks(base: DiffusionBase) -> Iterator[dict[int, Tensor]]:
    """Within the body, a forward pass fills the dictionary with two blocks' outputs and stops."""
    seen: dict[int, Tensor] = {}

    def watch(number: int, last: bool) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
            seen[number] = tensors[base.image_stream]
            if last:
                raise _SeenEnough

        return keep

    blocks = _blocks(base.denoiser)
    handles = [block.register_forward_hook(watch(i, i == len(blocks) - 1)) for i, block in enumerate(blocks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The first block on the way down and the middle block of a UNet; an early and the middle one of a transformer."""
    if isinstance(middle := getattr(denoiser, "mid_block", None), nn.Module):
        return [cast(Any, denoiser).down_blocks[0], middle]
    lists = (child for child in denoiser.children() if isinstance(child, nn.ModuleList))
    blocks = max((blocks for blocks in lists if type(blocks[0]).__name__.endswith("Block")), key=len)
    return [blocks[len(blocks) // 4], blocks[len(blocks) // 2]]


def _pooled(outputs: list[Tensor]) -> Tensor:
    """Outputs (B, C, H, W) or tokens (B, T, C) -> (B, features), float32: means over 16, 4 or 1 parts."""
    planes = [output if output.ndim == 4 else _as_plane(output.mT) for output in outputs]
    channels = sum(plane.shape[1] for plane in planes)
    side = next(side for side in (4, 2, 1) if channels * side**2 <= _MOST_OUTPUTS or side == 1)
    return torch.cat([F.adaptive_avg_pool2d(plane.float(), side).flatten(1) for plane in planes], dim=1)


def _as_plane(tokens_BCT: Tensor) -> Tensor:
    side = math.isqrt(tokens_BCT.shape[2])
    return tokens_BCT.unflatten(2, (side, side) if side**2 == tokens_BCT.shape[2] else (1, -1))


def _conditions(base: DiffusionBase) -> dict[str, Tensor]:
    """One row of the first class, or of an empty caption."""
    device = next(base.denoiser.parameters()).device
    if base.takes_classes:
        return {"class_labels": torch.zeros(1, dtype=torch.long, device=device)}
    if not base.takes_captions:
        return {}
    return {name: tensor.to(device) for name, tensor in base.encode_captions([""]).items()}


def _batches(images: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
    for start in range(0, len(images), _BATCH_SIZE):
        yield [images[i] for i in range(start, min(start + _BATCH_SIZE, len(images)))]
