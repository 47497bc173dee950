"""Regions of an image with contexts of their own: their masks, and where the tokens of a model's layers lie in them.

A layer's tokens are the image's, the text's, or both; which ones is known of the classes in `_KNOWN`, not guessed. Text
and what belongs to the whole image, such as the time, have the background's context.

Shapes: R regions, H x W pixels of a mask, n rows, T tokens, S features.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...contexts import ContextLike
from ...errors import UserTypeError, UserValueError
from ...messages.wording import quoted

_JOINT = "|add_[qkv]_proj|to_add_out"  # of attention between an image and a text
# Denoisers, and which of their layers see text. The others see the image's tokens row by row; Flux's single blocks the
# text's before them.
_KNOWN = {
    "UNet2DModel": "$.",
    "DiTTransformer2DModel": "$.",
    "UNet2DConditionModel": r"attn2\.to_[kv]|encoder_hid_proj",
    "PixArtTransformer2DModel": r"attn2\.to_[kv]|caption_projection",
    "SD3Transformer2DModel": f"context{_JOINT}",
    "FluxTransformer2DModel": f"context{_JOINT}",
    "QwenImageTransformer2DModel": f"txt_{_JOINT}",
}
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Regions:
    """Masks (R, H, W) of the regions, from 0 to 1, whose sum is nowhere above 1."""

    masks: Tensor

    def weights(self, grid: tuple[int, int]) -> Tensor:
        """Return the share of each region in the tokens of a grid, (R, h, w)."""
        return nn.functional.adaptive_avg_pool2d(self.masks, grid)


def read_regions(contexts: object, masks: Mapping[str, Any]) -> tuple[list[ContextLike], Regions]:
    """Return the contexts of the background and of the regions, and the regions' masks.

    Args:
        contexts: name of a region -> its context. One may have no mask: the background; by default it is the empty one.
        masks: name of a region -> its mask, an image or an array (H, W), white or 1 inside.

    Raises:
        TypeError: for contexts without names, or a mask that is neither an image nor an array.
        ValueError: for a mask without a context, several contexts without a mask, masks that overlap, are empty, or
            differ in size, and numbers that are not from 0 to 1.
    """
    if not isinstance(contexts, Mapping):
        raise UserTypeError(
            f"With masks=, contexts have the names of the masks: {{'left': 'thick', ...}}. Received: {contexts!r}."
        )
    without = [name for name in contexts if name not in masks]
    unknown = [name for name in masks if name not in contexts]
    if unknown or not masks or len(without) > 1:
        raise UserValueError(
            f"Masks: {quoted(masks) or 'none'}; contexts: {quoted(contexts) or 'none'}. Give every mask a context of "
            "the same name, and at most one context more: that of the background."
        )
    read = {name: _read(name, mask) for name, mask in masks.items()}
    if len({mask.shape for mask in read.values()}) > 1:
        sizes = ", ".join(f"{name!r} {mask.shape[1]} x {mask.shape[0]}" for name, mask in read.items())
        raise UserValueError(f"The masks differ in size ({sizes}). All have the size of the image.")
    stacked = torch.stack(list(read.values()))
    overlap = int((stacked.sum(0) > 1 + _TOLERANCE).sum())
    if overlap:
        raise UserValueError(
            f"The masks {quoted(read)} overlap in {overlap} pixels, whose context would be unclear. Make them "
            "disjoint, and give what they share a mask and a context of its own, such as 'a+b'."
        )
    background = contexts[without[0]] if without else ()
    return [background, *(contexts[name] for name in read)], Regions(stacked)


def _read(name: str, mask: Any) -> Tensor:
    if hasattr(mask, "convert"):  # an image of Pillow, which this package does without
        mask = np.asarray(mask.convert("L"), dtype=np.float32) / 255
    if not isinstance(mask, np.ndarray | Tensor):
        raise UserTypeError(
            f"The mask {name!r} is a {type(mask).__name__}. Give an image, or an array (height, width)."
        )
    tensor = torch.as_tensor(mask).detach().float().cpu()
    if tensor.ndim != 2:
        raise UserValueError(f"The mask {name!r} has the shape {tuple(tensor.shape)}. Give (height, width).")
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise UserValueError(f"The mask {name!r} has values outside of 0 to 1: 1 is inside of the region, 0 outside.")
    if not tensor.any():
        raise UserValueError(f"The mask {name!r} is empty, so its context would change nothing. Leave both out.")
    return tensor


@dataclass(frozen=True)
class Places:
    """Where the tokens of a forward lie.

    Attributes:
        grid: height and width of the model's input.
        rows: how many images there are.
        text: how many tokens each one's text has.
        text_layers: pattern in the names of those that see it.
    """

    grid: tuple[int, int]
    rows: int
    text: int
    text_layers: str
    shares: dict[tuple, Tensor] = field(default_factory=dict)  # of regions in the tokens of layers alike

    def weights(self, regions: Regions, z: Tensor, layer_name: str) -> Tensor | None:
        """Return the share of each region in a layer's tokens, (R, 1, T, 1) or (R, 1, h, w, 1); None of no image's.

        Raises:
            ValueError: where it cannot be known which tokens they are.
        """
        if z.ndim == 2 or z.shape[1:-1].numel() == 1 or re.search(self.text_layers, layer_name):
            return None  # one vector for each row, or text
        key = (regions, *z.shape[1:-1], z.dtype, z.device)
        if key not in self.shares:
            found = self._find(tuple(z.shape[1:-1])) if len(z) == self.rows else None
            if found is None:
                raise UserValueError(
                    f"Layer {layer_name!r} sees {tuple(z.shape[:-1])} rows and tokens, of {self.rows} images with "
                    f"{self.grid[0]} x {self.grid[1]} tokens and {self.text} tokens of text each, so it cannot be "
                    "known which of them are in which region. Use one context, or leave the layer out with "
                    "exclude_modules."
                )
            grid, before = found
            shares = regions.weights(grid).to(z)
            if z.ndim == 3:
                shares = nn.functional.pad(shares.flatten(1), (before, 0))
            self.shares[key] = shares[:, None, ..., None]
        return self.shares[key]

    def _find(self, tokens: tuple[int, ...]) -> tuple[tuple[int, int], int] | None:
        """The grid of a layer's image tokens, and how many of the text's are before them."""
        height, width = self.grid
        for halvings in range(max(self.grid).bit_length()):
            grid = -(-height // 2**halvings), -(-width // 2**halvings)
            if tokens in (grid, (grid[0] * grid[1],)):
                return grid, 0
        return (self.grid, self.text) if tokens == (self.text + height * width,) else None


def places(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], regions: list[Regions]) -> Places | None:
    """Return where the tokens of a forward lie; None for a text encoder, whose tokens are in no image.

    Raises:
        ValueError: for a model of which that is not known, or masks of another shape than its input.
    """
    if isinstance(model, PreTrainedModel):
        return None
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    image = given.get("sample", given.get("hidden_states"))
    grid = _grid(image, given) if isinstance(image, Tensor) and type(model).__name__ in _KNOWN else None
    if not isinstance(image, Tensor) or grid is None:
        raise UserValueError(
            f"Contexts per region need one image per row and one of {', '.join(_KNOWN)}. This is a "
            f"{type(model).__name__}, or it was called with something else. Use one context for the whole image."
        )
    for height, width in (each.masks.shape[1:] for each in regions):
        if height % grid[0] or width % grid[1] or height // grid[0] != width // grid[1]:
            raise UserValueError(
                f"The masks have {width} x {height} pixels, and the image {grid[1]} x {grid[0]} latent tokens, which "
                "are not squares of them. Give masks of the image's size."
            )
    text = given.get("encoder_hidden_states")
    length = text.shape[1] if isinstance(text, Tensor) else 0
    return Places(grid, len(image), length, _KNOWN[type(model).__name__])


def _grid(image: Tensor, given: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of what a denoiser works on: latents, or patches that a pipeline made of them."""
    if image.ndim == 4:
        return image.shape[2], image.shape[3]
    grid = None
    if isinstance(ids := given.get("img_ids"), Tensor):  # Flux: positions, after a zero if no other image is beside it
        grid = tuple(int(ids[..., axis].max()) + 1 for axis in (-2, -1)) if not ids[..., 0].any() else None
    elif shapes := given.get("img_shapes"):  # Qwen-Image: a list of images for each row
        kinds = {tuple(map(tuple, row)) for row in shapes}
        grid = next(iter(kinds))[0][1:] if len(kinds) == 1 else None
    return (grid[0], grid[1]) if grid and image.ndim == 3 and grid[0] * grid[1] == image.shape[1] else None
