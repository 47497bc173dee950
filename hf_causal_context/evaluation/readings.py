"""What the evaluation keeps of images or vectors, so that large images need not stay in memory.

Shapes: N rows, C channels, H x W pixels, A attributes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserValueError

LARGEST_SIDE = 64
NUM_EXAMPLES = 8


@dataclass(frozen=True)
class Measurements:
    """N rows as they are measured.

    `values` (N, ...) are vectors, or images of at most 64 pixels; `attributes` (N, A) and `features` (N, D) are
    there where a function for them was given. `examples` are the first few images, unreduced.
    """

    values: Tensor
    attributes: Tensor | None
    features: Tensor | None
    examples: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> Measurements:
        columns = (self.values, self.attributes, self.features)
        values, attributes, features = (None if column is None else column[rows] for column in columns)
        assert values is not None
        return replace(self, values=values, attributes=attributes, features=features)

    @classmethod
    def cat(cls, parts: Sequence[Measurements]) -> Measurements:
        """All rows of several."""
        columns = ([part.values for part in parts], [part.attributes for part in parts], [p.features for p in parts])
        values, attributes, features = (
            torch.cat([tensor for tensor in column if tensor is not None]) if column[0] is not None else None
            for column in columns
        )
        assert values is not None
        return cls(values, attributes, features, torch.cat([part.examples for part in parts])[:NUM_EXAMPLES])


@dataclass(frozen=True)
class Reader:
    """Turns rows into `Measurements`.

    Attributes:
        attributes: rows (N, ...) -> attributes (N, A); NaN where a row has none.
        attribute_names: their A names.
        feature_extractor: images (N, 3, H, W), uint8, -> features (N, D).
    """

    attributes: Callable[[Tensor], Tensor] | None = None
    attribute_names: tuple[str, ...] = ()
    feature_extractor: nn.Module | None = None

    def __call__(self, rows: Tensor, where: str, num_examples: int = NUM_EXAMPLES) -> Measurements:
        """Read rows (N, ...); images are (N, C, H, W) in [0, 1].

        Raises:
            ValueError: for values that are not finite (`where` says whose), attributes or features of another shape.
        """
        rows = rows.detach().float().cpu()
        if not torch.isfinite(rows).all():
            raise UserValueError(
                f"{where} contain NaN or infinite values. An adapter that diverged makes them, or a base in float16 "
                "that needs bfloat16 or float32."
            )
        values = rows
        if rows.ndim == 4 and max(rows.shape[2:]) > LARGEST_SIDE:
            scale = LARGEST_SIDE / max(rows.shape[2:])
            size = [max(1, round(side * scale)) for side in rows.shape[2:]]
            values = F.interpolate(rows, size, mode="bilinear", antialias=True)
        return Measurements(values, self._read_attributes(rows), self._features(rows, where), rows[:num_examples])

    def _read_attributes(self, rows: Tensor) -> Tensor | None:
        if self.attributes is None:
            return None
        read = torch.as_tensor(self.attributes(rows)).float().cpu()
        if read.shape != (len(rows), len(self.attribute_names)):
            raise UserValueError(
                f"attributes= returned shape {tuple(read.shape)} for {len(rows)} rows and {len(self.attribute_names)} "
                "attribute_names=. It must return one row for each, with one column for every name."
            )
        return read

    @torch.no_grad()
    def _features(self, rows: Tensor, where: str) -> Tensor | None:
        if self.feature_extractor is None:
            return None
        if rows.ndim != 4 or rows.shape[1] not in (1, 3):
            raise UserValueError(
                f"feature_extractor= takes images (N, 1 or 3, H, W); {where} have shape {tuple(rows.shape)}. Leave "
                "it out."
            )
        images = (rows.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        parameter = next(self.feature_extractor.parameters(), None)
        features = self.feature_extractor.eval()(images if parameter is None else images.to(parameter.device))
        if features.ndim != 2 or len(features) != len(rows):
            raise UserValueError(
                f"feature_extractor= returned shape {tuple(features.shape)} for {len(rows)} images. It must return "
                "one row of features for each."
            )
        return features.float().cpu()
