"""FID and KID, computed by torchmetrics on the features of a model that the user chooses.

Shapes: N and M rows, D features, H x W pixels.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from .._random import seeded
from ..errors import MissingPackageError, UserValueError
from ..messages.installation import installation

_LARGEST_SUBSET = 1000
_DEFAULT_SIDE, _DEFAULT_MEAN, _DEFAULT_DEVIATION = 224, (0.5,) * 3, (0.5,) * 3


def require_torchmetrics() -> None:
    """Refuse, before the work, what could not be computed after it.

    Raises:
        ImportError: without torchmetrics.
    """
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"FID and KID need torchmetrics: {installation('metrics')}") from error


def frechet_and_kernel_distance(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """FID and KID between features (N, D) and (M, D); the subsets of KID are always the same."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that KID keeps features: they are in memory anyway
        subset = min(_LARGEST_SUBSET, len(samples), len(reference))
        fid = FrechetInceptionDistance(feature=_Identity(samples.shape[1]))
        kid = KernelInceptionDistance(feature=_Identity(samples.shape[1]), subset_size=subset)
        for metric in (fid, kid):
            metric.update(reference, real=True)
            metric.update(samples, real=False)
        return float(fid.compute()), float(kid.compute()[0])


class _Identity(nn.Module):
    """Features are extracted once and compared several times, so that torchmetrics gets them as "images"."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class VisionFeatures(nn.Module):
    """The pooled output of a transformers vision model: images (N, 3, H, W), uint8, -> features (N, D)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: nn.Module, size: int, mean: Any, deviation: Any) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Resize, normalize as the model's image processor does, and pool."""
        pixels = F.interpolate(images.float() / 255, (self.size, self.size), mode="bicubic", antialias=True)
        output = self.model(pixel_values=(pixels.clamp(0, 1) - self.mean) / self.deviation)
        return output.pooler_output.flatten(1)


def load_vision_features(name_or_path: str) -> VisionFeatures:
    """Load a vision model, from a folder or the Hub; only safetensors, and no code from the repository.

    Raises:
        OSError: for something that is not a transformers model.
        ValueError: for a model that transformers does not know, or without a pooled output of images.
    """
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        loaded, info = AutoModel.from_pretrained(
            name_or_path, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (ValueError, ImportError, SafetensorError) as error:  # no model, a package that it needs, a damaged file
        raise UserValueError(f"--feature_extractor {name_or_path!r} cannot be loaded: {error}") from error
    if missing := sorted(name for name in info["missing_keys"] if "text" not in name):
        raise UserValueError(
            f"--feature_extractor {name_or_path!r} lacks weights of its model, which would be random: "
            f"{', '.join(missing[:3])}. Name a complete vision model, such as facebook/dinov2-small."
        )
    model = getattr(loaded, "vision_model", loaded)  # the half of CLIP and SigLIP that sees
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise UserValueError(
            f"--feature_extractor {name_or_path!r} is a {type(model).__name__}, which takes no images. Name a vision "
            "model, such as facebook/dinov2-small or openai/clip-vit-base-patch32."
        )
    try:
        settings: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(name_or_path)[0]
    except OSError:
        settings = {}
    size = _side(settings) or cast(Any, model).config.to_dict().get("image_size") or _DEFAULT_SIDE
    mean, deviation = settings.get("image_mean") or _DEFAULT_MEAN, settings.get("image_std") or _DEFAULT_DEVIATION
    features = VisionFeatures(model.eval(), size, mean, deviation)
    with torch.no_grad():
        output = cast(Any, features.model)(pixel_values=torch.zeros(1, 3, size, size))
    if getattr(output, "pooler_output", None) is None:
        raise UserValueError(
            f"--feature_extractor {name_or_path!r} is a {type(model).__name__}, which has no pooled output. Name "
            "another vision model, such as facebook/dinov2-small."
        )
    return features


def _side(settings: dict[str, Any]) -> int | None:
    """Pixels that an image processor gives its model."""
    size = settings.get("crop_size") or settings.get("size")
    return (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size
