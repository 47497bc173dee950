"""What an image would have been under another intervention: abduction, action, prediction (Pearl).

Abduction finds the noise by which a stochastic sampler would have drawn the image; action changes the context;
prediction samples again, with that noise. The image is given noise of every level, x_t = a_t x_0 + s_t e_t, for each
level anew. A step of the sampler (for diffusion that of DDPM, Ho et al., 2020) leads from x_t to the less noisy
x_s = mean(x_t) + d z, and the noise map z is chosen so that it leads there exactly. Without a change of context the
image itself comes back, and with one

    y_s = mean(y_t; to) + d z = x_s + mean(y_t; to) - mean(x_t; from).

Such maps keep the structure of an image better than the noise of a deterministic sampler does: Huberman-Spiegelglas et
al., "An Edit Friendly DDPM Noise Space" (CVPR 2024).

Shapes: B images, L strengths, S steps, C channels, H x W pixels or latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..adapter.intervene import intervene
from ..bases.diffusion_base import DiffusionBase
from ..bases.images import read_image
from ..bases.loading import as_base
from ..contexts import OBSERVATIONAL, Context, ContextLike, as_context
from ..errors import UserTypeError, UserValueError
from ..media.pixels import plain
from ..messages.progress import ProgressBar
from .sampling import check_conditions, eval_mode
from .sampling_steps import Step, clean_of, sampling_steps, times_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

VISIBLE_ERROR = 0.05  # root mean square, of images in [0, 1]: what an eye sees when it compares
_SAME_SHAPE = 0.01  # by which width / height may differ, relatively: sizes are whole numbers
_SOME_NOISE = 0.15  # of data of about unit variance: the base must draw their details again, and knows the rest


@dataclass(frozen=True)
class Counterfactual:
    """Images of a counterfactual, and how far the base can be trusted with them.

    Attributes:
        images: (L, B, C, H, W) in [0, 1], float32 on the CPU, one for every strength.
        reconstruction: (B, C, H, W), the images as the base draws them again under `from_context`, after some noise:
            what should be the images themselves.
        reconstruction_error: (B,), root mean square difference between the two in [0, 1] units. Of latent bases it is
            that from what the autoencoder makes of the image, whose own loss comes on top.
        noise: (S, B, C, H, W), the noise map of every step, in the denoiser's space.
    """

    images: Tensor
    reconstruction: Tensor
    reconstruction_error: Tensor
    noise: Tensor


def counterfactual(
    pipe: DiffusionBase | DiffusionPipeline,
    image: Image.Image | Sequence[Image.Image] | Tensor,
    to_context: ContextLike,
    from_context: ContextLike = (),
    *,
    strengths: Sequence[float] = (1.0,),
    mask: Image.Image | Tensor | None = None,
    prompt: str | None = None,
    class_label: int | None = None,
    num_inference_steps: int = 50,
    calibrated: bool = False,
) -> Counterfactual:
    """Return what images of `from_context` would have been under `to_context`, all else being equal.

    There is no classifier-free guidance, and the same noise for the same image at every call.

    Args:
        pipe: a pipeline with an adapter.
        image: an image, several, or a tensor (B, C, H, W) in [0, 1]; of the size that the base generates.
        to_context: the context asked about.
        from_context: the context that the images were made in; () is observational.
        strengths: s leads from `from_context` (0) to `to_context` (1), m = from + s (to - from); others interpolate and
            extrapolate. All share one abduction.
        mask: (H, W) in [0, 1], or a gray image of the shape of the images or of the middle that is kept of them: 1
            where the edit may act, elsewhere the image stays as it is.
        prompt: of the images, for bases that take text.
        class_label: of the images, for bases that are conditioned on classes.
        num_inference_steps: of the sampler.
        calibrated: strengths, those on the way too, are positions of dials; see `intervene`.

    Raises:
        TypeError: for something that is no image or no context.
        ValueError: without an adapter, for unknown concepts, or images, masks or conditions that do not fit the base,
            and while the denoiser has a cache.

    Example:
        >>> edit = counterfactual(pipe, image, "thickness", strengths=[0.5, 1])   # doctest: +SKIP
    """
    [found] = counterfactuals(
        pipe,
        image,
        [to_context],
        from_context,
        strengths=strengths,
        mask=mask,
        prompt=prompt,
        class_label=class_label,
        num_inference_steps=num_inference_steps,
        calibrated=calibrated,
    )
    return found


@torch.no_grad()
def counterfactuals(
    pipe: DiffusionBase | DiffusionPipeline,
    image: Image.Image | Sequence[Image.Image] | Tensor,
    to_contexts: Sequence[ContextLike],
    from_context: ContextLike,
    *,
    strengths: Sequence[float],
    mask: Image.Image | Tensor | None,
    prompt: str | None,
    class_label: int | None,
    num_inference_steps: int,
    calibrated: bool,
) -> list[Counterfactual]:
    """Return the `counterfactual` of each of several contexts, which share one abduction."""
    base = pipe if isinstance(pipe, DiffusionBase) else as_base(pipe)
    base.require_images("counterfactual")
    _check_no_cache(base)
    check_conditions(base, prompt, class_label, None, None)
    if np.ndim(strengths) != 1 or len(strengths) == 0 or not np.isfinite(strengths).all():
        raise UserValueError(f"strengths={strengths!r} must be one or more finite numbers, such as [0.5, 1.0].")
    source = as_context(from_context)
    ways = [[_between(source, as_context(each), s) for s in strengths] for each in to_contexts]
    for contexts in ([source], *ways):
        intervene(base.pipe, contexts, calibrated=calibrated)  # errors show here, before any work
    if num_inference_steps < 1:
        raise UserValueError(f"num_inference_steps={num_inference_steps} must be at least 1; 50 is usual.")
    base.check_steps(num_inference_steps)
    pixels = _pixels(base, image)
    weights = None if mask is None else _mask(mask, pixels, image)

    with eval_mode(base.denoiser):
        sampler = Sampler(base, num_inference_steps, prompt, class_label, calibrated)
        clean = base.encode_images((2 * pixels - 1).to(sampler.device)).float()
        coarse = None if weights is None else F.adaptive_avg_pool2d(weights, clean.shape[2:])  # type: ignore[arg-type]
        shown = base.decode_images(clean).float().cpu()
        abducted = sampler.backward(clean, source)
        reconstruction = base.decode_images(abducted.redrawn).float().cpu()
        error = (reconstruction - shown).square().flatten(1).mean(1).sqrt()
        noise = torch.stack(abducted.maps).cpu()
        found = []
        for contexts in ways:
            edits = base.decode_images(sampler.forward(abducted, contexts, coarse)).float().cpu()
            images = edits.view(len(contexts), *pixels.shape)
            if weights is not None:
                images = weights * images + (1 - weights) * pixels
            found.append(Counterfactual(images, reconstruction, error, noise))
    return found


def _check_no_cache(base: DiffusionBase) -> None:
    if getattr(base.denoiser, "is_cache_enabled", False):
        raise UserValueError(
            f"The {type(base.denoiser).__name__} has a cache enabled, which would give an edit outputs of other steps "
            f"and of other contexts. Call pipe.{base.denoiser_name}.disable_cache() first."
        )


def doubt(reconstruction_error: float) -> str:
    """Return why an edit with this error is not to be trusted, and nothing where it is."""
    if reconstruction_error <= VISIBLE_ERROR:
        return ""
    return (
        "The reconstruction did not hold: after some noise, the base draws visibly another image (error above "
        f"{VISIBLE_ERROR:g}), so its edits of yours are not to be trusted. The image may be unlike what the base "
        "draws, or made in another context than you say; more steps help sometimes."
    )


@dataclass(frozen=True)
class Abducted:
    """What is known of images (B, C, H, W) in the denoiser's space.

    Attributes:
        path: the images with ever less noise, S of them, and the images themselves.
        maps: the noise with which each step leads from one to the next, S of (B, C, H, W).
        redrawn: what the denoiser takes for the images where they have some noise.
    """

    path: list[Tensor]
    maps: list[Tensor]
    redrawn: Tensor


class Sampler:
    """Steps between an image and its noise, both ways."""

    def __init__(
        self, base: DiffusionBase, steps: int, prompt: str | None, class_label: int | None, calibrated: bool = False
    ) -> None:
        self.base, self.prompt, self.class_label, self.calibrated = base, prompt, class_label, calibrated
        denoiser: Any = base.denoiser
        self.dtype: torch.dtype = denoiser.dtype
        self.device: torch.device = base.pipe._execution_device
        self.steps = steps

    def backward(self, clean: Tensor, context: Context) -> Abducted:
        """Find the noise of images (B, C, H, W) that were made in a context."""
        grid, conditions = self.grid(clean), self._conditions([context] * len(clean))
        generator = torch.Generator().manual_seed(0)
        noises = torch.randn((len(grid), *clean.shape[1:]), generator=generator).to(clean)  # in a batch as alone
        path = [step.alpha * clean + step.sigma * noise for step, noise in zip(grid, noises, strict=True)] + [clean]
        redrawn, maps = clean, []
        with (
            intervene(self.base.pipe, context, calibrated=self.calibrated),
            ProgressBar(total=len(grid), desc="edit", unit="step") as bar,
        ):
            for number, step in enumerate(grid):
                predicted = self.predict_clean(path[number], step, conditions)
                if step.sigma > _SOME_NOISE or number == 0:
                    redrawn = predicted
                maps.append((path[number + 1] - step.mean(path[number], predicted)) / step.deviation)
                bar.update()
        return Abducted(path, maps, redrawn)

    def forward(self, found: Abducted, contexts: Sequence[Context], weight: Tensor | None = None) -> Tensor:
        """Images in the first context, then in the second, ...; where the weight is 0, they stay on the path."""
        each = [context for context in contexts for _ in range(len(found.redrawn))]
        grid, conditions = self.grid(found.redrawn), self._conditions(each)
        weight = None if weight is None else weight.to(found.redrawn.device)
        x = _repeated(found.path[0], contexts)
        with (
            intervene(self.base.pipe, each, calibrated=self.calibrated),
            ProgressBar(total=len(grid), desc="edit", unit="step") as bar,
        ):
            for number, step in enumerate(grid):
                noise = _repeated(step.deviation * found.maps[number], contexts)
                x = step.mean(x, self.predict_clean(x, step, conditions)) + noise
                if weight is not None:
                    x = weight * x + (1 - weight) * _repeated(found.path[number + 1], contexts)
                bar.update()
        return x

    def predict_clean(self, x: Tensor, step: Step, conditions: dict[str, Tensor]) -> Tensor:
        """What the denoiser takes for the clean images of x, float32."""
        times = times_for(self.base.prediction, torch.full((len(x),), step.time, device=x.device))
        output = self.base.predict(self.base.denoiser, x.to(self.dtype), times, conditions, None).float()
        return clean_of(self.base.prediction, x, output, step.alpha, step.sigma)

    def grid(self, clean: Tensor) -> list[Step]:
        """Steps from noise towards the image."""
        return sampling_steps(self.base, self.steps, clean)

    def _conditions(self, contexts: list[Context]) -> dict[str, Tensor]:
        """Those of rows in these contexts, which text encoders may know, too."""
        if self.base.takes_classes:
            return {"class_labels": torch.tensor([self.class_label] * len(contexts), device=self.device)}
        if not self.base.takes_captions:
            return {}
        each = list(dict.fromkeys(contexts))
        with intervene(self.base.pipe, each, calibrated=self.calibrated):
            encoded = self.base.encode_captions([self.prompt or ""] * len(each))
        rows = torch.tensor([each.index(context) for context in contexts], device=self.device)
        return {name: values[rows.to(values.device)] for name, values in encoded.items()}


def _repeated(rows: Tensor, contexts: Sequence[Context]) -> Tensor:
    return torch.cat([rows] * len(contexts))


def _between(source: Context, target: Context, strength: float) -> Context:
    a, b = ({**context.strengths, OBSERVATIONAL: context.observational} for context in (source, target))
    return Context({name: a.get(name, 0.0) + strength * (b.get(name, 0.0) - a.get(name, 0.0)) for name in {**a, **b}})


def _pixels(base: DiffusionBase, image: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
    """(B, C, H, W) in [0, 1]; images are turned to the base's size and channels as in training."""
    if not isinstance(image, Tensor):
        images = [image] if isinstance(image, Image.Image) else list(image)
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise UserTypeError(
                f"image={image!r} is no image. Pass a PIL image, a list of them, or a tensor (B, C, H, W) in [0, 1]."
            )
        arrays = [read_image(image, base.image_channels, base.default_resolution) for image in images]
        return torch.from_numpy(np.stack(arrays)).float() / 255
    if image.ndim != 4 or not image.numel() or not image.is_floating_point() or not _in_range(image):
        raise UserValueError(
            f"image is a tensor of shape {tuple(image.shape)} and type {image.dtype} with values {_range(image)}. Pass "
            "floats (B, C, H, W) in [0, 1]."
        )
    if base.fixed_size and image.shape[2:] != (base.default_resolution,) * 2:
        raise UserValueError(
            f"image has {image.shape[2]} x {image.shape[3]} pixels, and {type(base.pipe).__name__} generates "
            f"{base.default_resolution} x {base.default_resolution} only. Resize it, or pass PIL images."
        )
    return image.detach().float().cpu()


def _mask(mask: Image.Image | Tensor, pixels: Tensor, image: Image.Image | Sequence[Image.Image] | Tensor) -> Tensor:
    """(1, 1, H, W) in [0, 1], for images of which the pixels are."""
    height, width = pixels.shape[2:]
    if isinstance(mask, Image.Image):
        upright = plain(mask).convert("L")
        _check_shape(upright.size, (width, height), image)
        gray = ImageOps.fit(upright, (width, height))
        return torch.from_numpy(np.asarray(gray).copy()).float()[None, None] / 255
    if tuple(mask.shape) != (height, width) or not _in_range(mask):
        raise UserValueError(
            f"mask has shape {tuple(mask.shape)} and values {_range(mask)}. Pass ({height}, {width}) in [0, 1], 1 "
            "where the edit may act, or a gray image."
        )
    return mask.detach().float().cpu()[None, None]


def _check_shape(size: tuple[int, int], kept: tuple[int, int], image: object) -> None:
    """Refuse a mask of this size that is cut in another way than an image, so that it would mean other places of it."""

    def alike(other: tuple[int, int]) -> bool:
        a, b = size[0] * other[1], size[1] * other[0]
        return abs(a - b) <= _SAME_SHAPE * max(a, b)

    images = [] if isinstance(image, Tensor) else [image] if isinstance(image, Image.Image) else cast(list, image)
    sizes = [ImageOps.exif_transpose(each).size for each in images] or [kept]
    if not alike(kept) and (other := next((each for each in sizes if not alike(each)), None)):
        raise UserValueError(
            f"mask has {size[0]} x {size[1]} pixels, and an image {other[0]} x {other[1]}, which is another shape, so "
            f"which places are meant is not clear. Give it the shape of the images, or that of the {kept[0]} x "
            f"{kept[1]} pixels that are edited."
        )


def _in_range(values: Tensor) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _range(values: Tensor) -> str:
    return f"from {float(values.min()):g} to {float(values.max()):g}" if values.numel() else "none"
