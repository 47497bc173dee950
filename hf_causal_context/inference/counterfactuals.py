"""What an image would have been under another intervention: abduction, action, prediction (Pearl).

Abduction runs the sampler backwards, from the image to the noise that it would have been drawn from; action changes
the context; prediction runs the sampler forwards. The sampler takes Euler steps of the probability-flow ODE, for
diffusion those of DDIM (Song et al., 2021): from the noisier x' to x with x' = c x + d e(x'), where e is the predicted
noise (for flows the velocity, and c = 1). The step backwards solves the same equation for x': it is the exact inverse.

Shapes: B images, L strengths, C channels, H x W pixels or latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image, ImageOps
from torch import Tensor

from .._pixels import plain
from .._progress import ProgressBar
from ..adapter.intervene import intervene
from ..bases.diffusion_base import DiffusionBase
from ..bases.images import read_image
from ..bases.loading import as_base
from ..contexts import OBSERVATIONAL, Context, ContextLike, as_context
from ..errors import UserTypeError, UserValueError
from .sampling import check_conditions, eval_mode

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

VISIBLE_ERROR = 0.05  # root mean square, of images in [0, 1]: what an eye sees when it compares
_SMALLEST_SNR = 1e-4
_MAX_ITERATIONS = 50
_TOLERANCE = 1e-4  # of x', root mean square; data have about unit variance
_SMALLEST_DAMPING = 0.05  # below it, a half-precision denoiser's rounding is all that is left


@dataclass(frozen=True)
class Counterfactual:
    """Images of a counterfactual, and how far the abduction can be trusted.

    Attributes:
        images: (L, B, C, H, W) in [0, 1], float32 on the CPU, one for every strength.
        reconstruction: (B, C, H, W), the abducted noise under `from_context`: what should be the image itself.
        reconstruction_error: (B,), root mean square difference between the two in [0, 1] units. Of latent bases it is
            that from what the autoencoder makes of the image, whose own loss comes on top.
        noise: (B, C, H, W), what abduction found, in the denoiser's space; standard normal if the image is one that
            the base could have drawn.
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

    There is no classifier-free guidance: amplified predictions cannot be inverted.

    Args:
        pipe: a pipeline with an adapter.
        image: an image, several, or a tensor (B, C, H, W) in [0, 1]; of the size that the base generates.
        to_context: the context asked about.
        from_context: the context that the images were made in; () is observational.
        strengths: s leads from `from_context` (0) to `to_context` (1), m = from + s (to - from); others interpolate and
            extrapolate. All share one abduction.
        mask: (H, W) in [0, 1] or a gray image: 1 where the edit may act, elsewhere the image stays as it is.
        prompt: of the images, for bases that take text.
        class_label: of the images, for bases that are conditioned on classes.
        num_inference_steps: of the sampler. More make the steps smaller, so that abduction is easier.
        calibrated: strengths, those on the way too, are positions of dials; see `intervene`.

    Raises:
        TypeError: for something that is no image or no context.
        ValueError: without an adapter, for unknown concepts, or images, masks or conditions that do not fit the base.

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
    check_conditions(base, prompt, class_label, None, None)
    if len(strengths) == 0 or not np.isfinite(strengths).all():
        raise UserValueError(f"strengths={list(strengths)} must be one or more finite numbers, such as [0.5, 1.0].")
    source = as_context(from_context)
    ways = [[source, *(_between(source, as_context(each), s) for s in strengths)] for each in to_contexts]
    for contexts in ways:
        intervene(base.pipe, contexts, calibrated=calibrated)  # errors show here, before any work
    if num_inference_steps < 1:
        raise UserValueError(f"num_inference_steps={num_inference_steps} must be at least 1; 50 is usual.")
    pixels = _pixels(base, image)
    weights = None if mask is None else _mask(mask, pixels)

    with eval_mode(base.denoiser):
        sampler = Sampler(base, num_inference_steps, prompt, class_label, calibrated)
        clean = base.encode_images((2 * pixels - 1).to(sampler.device)).float()
        path = sampler.backward(clean, source)
        coarse = None if weights is None else F.adaptive_avg_pool2d(weights, clean.shape[2:])  # type: ignore[arg-type]
        shown = base.decode_images(clean).float().cpu()
        found = []
        for contexts in ways:
            rows = torch.cat([path[-1]] * len(contexts))
            decoded = base.decode_images(sampler.forward(rows, contexts, path, coarse)).float().cpu()
            reconstruction, *edits = decoded.split(len(pixels))
            images = torch.stack(edits)
            if weights is not None:
                images = weights * images + (1 - weights) * pixels
            error = (reconstruction - shown).square().flatten(1).mean(1).sqrt()
            found.append(Counterfactual(images, reconstruction, error, path[-1].cpu()))
    return found


def doubt(reconstruction_error: float) -> str:
    """Return why an edit with this error is not to be trusted, and nothing where it is."""
    if reconstruction_error <= VISIBLE_ERROR:
        return ""
    return (
        f"The inversion did not hold: the reconstruction is visibly another image (error above {VISIBLE_ERROR:g}), so "
        "this is no counterfactual of yours. The image may be unlike what the base draws, or made in another context "
        "than you say; more steps help sometimes."
    )


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

    def backward(self, clean: Tensor, context: Context) -> list[Tensor]:
        """(B, C, H, W) at every step, from the image to its noise."""
        path = [clean]
        grid = self._grid(clean)
        conditions = self._conditions([context] * len(clean))
        with (
            intervene(self.base.pipe, context, calibrated=self.calibrated),
            ProgressBar(total=len(grid), desc="edit", unit="step") as bar,
        ):
            for step in grid:
                path.append(step.backward(path[-1], lambda x, step=step: self._predict(x, step, conditions)))
                bar.update()
        return path

    def forward(self, noise: Tensor, contexts: Sequence[Context], path: list[Tensor], weight: Tensor | None) -> Tensor:
        """From noise (rows of the first context, then of the second, ...) to images; outside the mask as on the path.

        The first context's rows are those of the reconstruction, and are not masked.
        """
        images = len(path[0])
        each = [context for context in contexts for _ in range(images)]
        conditions = self._conditions(each)
        grid = self._grid(path[0])
        x = noise
        weight = None if weight is None else weight.to(x.device)
        with (
            intervene(self.base.pipe, each, calibrated=self.calibrated),
            ProgressBar(total=len(grid), desc="edit", unit="step") as bar,
        ):
            for number, step in reversed(list(enumerate(grid))):
                x = step.forward(x, self._predict(x, step, conditions))
                if weight is not None:
                    kept = torch.cat([path[number]] * (len(contexts) - 1))
                    x = torch.cat([x[:images], weight * x[images:] + (1 - weight) * kept])
                bar.update()
        return x

    def _grid(self, clean: Tensor) -> list[_Step]:
        """Steps from the image towards noise."""
        scheduler: Any = self.base.pipe.scheduler
        if self.base.prediction == "flow":
            flow: Any = self.base.euler_scheduler()
            flow.set_timesteps(self.steps, **self.base.flow_schedule(self.steps, clean))
            sigmas, times = flow.sigmas.flip(0).double(), flow.timesteps.flip(0)
            return [
                _Step(float(t), 1.0, float(b - a), 0, 1) for t, a, b in zip(times, sigmas[:-1], sigmas[1:], strict=True)
            ]
        diffusion: Any = DDIMScheduler.from_config(scheduler.config)
        diffusion.set_timesteps(self.steps)
        times = diffusion.timesteps.flip(0)
        squares = diffusion.alphas_cumprod[times].double()
        # A step from (almost) pure noise forgets where it came from: there is nothing to invert.
        times, squares = times[squares > _SMALLEST_SNR], squares[squares > _SMALLEST_SNR]
        if not len(times):
            raise UserValueError(
                f"num_inference_steps={self.steps} leads from pure noise to the image without a step in between that "
                "could be inverted. Use more; 50 is usual."
            )
        alphas = torch.cat([torch.ones(1), squares.sqrt()])
        sigmas = torch.cat([torch.zeros(1), (1 - squares).sqrt()])
        ratios = alphas[1:] / alphas[:-1]
        slopes = sigmas[1:] - ratios * sigmas[:-1]
        columns = (times, ratios, slopes, alphas[1:], sigmas[1:])
        return [_Step(*(float(value) for value in row)) for row in zip(*columns, strict=True)]

    def _predict(self, x: Tensor, step: _Step, conditions: dict[str, Tensor]) -> Tensor:
        """e(x): the predicted noise, or of a flow the velocity, float32."""
        times = torch.full((len(x),), step.time, device=x.device)
        if self.base.prediction != "flow":
            times = times.long()
        given = x.to(self.dtype)
        output = self.base.predict(self.base.denoiser, given, times, conditions, None).float()
        if self.base.prediction == "v_prediction":
            return step.alpha * output + step.sigma * x
        return (x - step.alpha * output) / step.sigma if self.base.prediction == "sample" else output

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


@dataclass(frozen=True)
class _Step:
    """x' = ratio x + slope e(x'), from x to the noisier x'; `time` as the denoiser knows it; alpha and sigma of x'."""

    time: float
    ratio: float
    slope: float
    alpha: float
    sigma: float

    def forward(self, noisier: Tensor, prediction: Tensor) -> Tensor:
        return (noisier - self.slope * prediction) / self.ratio

    def backward(self, x: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
        """Solve for x' by fixed-point iteration, damped in rows where it does not converge by itself."""
        column = (-1, *(1,) * (x.ndim - 1))
        found, change = x, torch.zeros_like(x)
        left = x.new_full((len(x),), torch.inf)
        damping = torch.ones_like(left)
        for _ in range(_MAX_ITERATIONS):
            # Rows stop on their own, so that a batch gives what its rows give alone.
            going = (left > _TOLERANCE) & (damping > _SMALLEST_DAMPING)
            if not going.any():
                break
            candidate = found + damping.view(column) * change
            step = self.ratio * x + self.slope * predict(candidate) - candidate
            size = step.square().flatten(1).mean(1).sqrt()
            better = going & (size < left)
            damping = torch.where(going & ~better, damping / 2, damping)
            left = torch.where(better, size, left)
            found = torch.where(better.view(column), candidate, found)
            change = torch.where(better.view(column), step, change)
        return found + damping.view(column) * change


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


def _mask(mask: Image.Image | Tensor, pixels: Tensor) -> Tensor:
    """(1, 1, H, W) in [0, 1]."""
    height, width = pixels.shape[2:]
    if isinstance(mask, Image.Image):
        gray = ImageOps.fit(plain(mask).convert("L"), (width, height))
        return torch.from_numpy(np.asarray(gray).copy()).float()[None, None] / 255
    if tuple(mask.shape) != (height, width) or not _in_range(mask):
        raise UserValueError(
            f"mask has shape {tuple(mask.shape)} and values {_range(mask)}. Pass ({height}, {width}) in [0, 1], 1 "
            "where the edit may act, or a gray image."
        )
    return mask.detach().float().cpu()[None, None]


def _in_range(values: Tensor) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _range(values: Tensor) -> str:
    return f"from {float(values.min()):g} to {float(values.max()):g}" if values.numel() else "none"
