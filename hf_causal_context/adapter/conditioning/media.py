"""Images, videos and sounds that a model reads beside text: which layers see them, and whether samples have as many.

Their rows are those of the media, not of the samples: one sample may have two images and another one none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_TOWER = re.compile("vision|visual|image|video")
_MEDIA = re.compile(
    f"{_TOWER.pattern}|audio|speech|sound|project(or|ion)|connector|aligner|resampler|perceiver|qformer|merger|"
    r"multi_?modal|^(model\.)?encoder\."
)
_INPUTS = re.compile("pixel_values|image|video|audio|input_(features|values)")
_GRIDS = re.compile("grid_(thw|hw)")  # of the patches of each image, which lie in one row
_TOKENS = [f"{medium}_token_{end}" for medium in ("image", "video", "audio") for end in ("id", "index")]


def is_tower(layer_name: str) -> bool:
    """Whether a layer sees images alone."""
    return _TOWER.search(layer_name) is not None


def may_see_media(layer_name: str) -> bool:
    """Whether the rows of a layer may be those of images, videos or sounds."""
    return _MEDIA.search(layer_name) is not None


def has_ragged_media(model: nn.Module, kwargs: Mapping[str, Any], num_rows: int) -> bool:
    """Whether some samples have another number or size of images, videos or sounds than others, as far as is known."""
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and value.ndim}
    grids = [value for name, value in tensors.items() if _GRIDS.search(name)]
    if any(len(grid) != num_rows or bool((grid != grid[:1]).any()) for grid in grids):
        return True
    ids = tensors.get("input_ids")
    media = [value for name, value in tensors.items() if _INPUTS.match(name) and value.is_floating_point()]
    if ids is None or not media:
        return False
    if not grids and any(len(each) != num_rows for each in media):
        return True
    config = getattr(model, "config", None)
    tokens = [token for name in _TOKENS if isinstance(token := getattr(config, name, None), int)]
    counts = [(ids == token).sum(-1) for token in tokens]
    return any(bool((count != count[:1]).any()) for count in counts)
