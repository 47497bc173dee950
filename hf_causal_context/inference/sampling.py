"""Images from a base and its adapter: the same seeds in several contexts, and grids of them.

Shapes: S seeds, C channels, H x W pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypedDict, Unpack, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..adapter.intervene import intervene
from ..adapter.lookup import conditionings
from ..bases.diffusion_base import DiffusionBase
from ..bases.loading import as_base
from ..contexts import Context, ContextLike, as_context
from ..errors import UserTypeError, UserValueError, is_out_of_memory
from ..messages.progress import ProgressBar

NUM_INFERENCE_STEPS, BATCH_SIZE = 25, 8


class SamplingOptions(TypedDict, total=False):
    """How images are sampled, for functions that hand it on; see `generate_jobs`."""

    prompt: str | None
    class_label: int | None
    num_inference_steps: int
    guidance_scale: float | None
    resolution: int | None
    num_frames: int | None
    batch_size: int


def generate(
    base: DiffusionBase | DiffusionPipeline,
    contexts: Sequence[ContextLike],
    *,
    seeds: Sequence[int],
    **sampling: Unpack[SamplingOptions],
) -> list[Tensor]:
    """Images (S, C, H, W) in [0, 1] for every context, on the CPU; of bases of videos clips (S, F, C, H, W).

    A seed gives the same noise in every context, whatever the batch size and the device. Different contexts share
    batches. A base without an adapter knows the observational context only.

    Args:
        base: a pipeline, or a `DiffusionBase`.
        contexts: () is the observational one.
        seeds: one image of each context for each.
        sampling: as of `generate_jobs`.

    Raises:
        TypeError: for a single context or seed in place of a sequence of them, or something that is no context.
        ValueError: for no contexts or seeds, conditions that the base does not take or lacks, unknown concepts, or
            targets without an adapter.
    """
    if isinstance(contexts, str | Mapping | Context):
        raise UserTypeError(
            f"contexts={contexts!r} is a single context. Pass a list of contexts, such as [(), 'thick']."
        )
    if isinstance(seeds, int):
        raise UserTypeError(f"seeds={seeds} is a single seed. Pass a list of seeds, such as [0, 1, 2].")
    batch_size = sampling.get("batch_size", BATCH_SIZE)
    if not contexts or not seeds or batch_size < 1:
        raise UserValueError(
            f"Nothing to generate: {len(contexts)} contexts, {len(seeds)} seeds, batch_size={batch_size}. Give at "
            "least one of each; the observational context is ()."
        )
    jobs = [(context, seed) for context in map(as_context, contexts) for seed in seeds]
    made = []
    with ProgressBar(total=len(jobs), desc="sample", unit="image") as bar:
        for images in generate_jobs(base if isinstance(base, DiffusionBase) else as_base(base), jobs, **sampling):
            made.append(images)
            bar.update(len(images))
    return list(torch.cat(made).split(len(seeds)))


@torch.no_grad()
def generate_jobs(
    base: DiffusionBase,
    jobs: Sequence[tuple[Context, int]],
    *,
    prompt: str | None = None,
    class_label: int | None = None,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    num_frames: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Tensor]:
    """Yield the images of each context and seed, in their order, in batches (n, [F,] C, H, W); see `generate`.

    Args:
        base: the pipeline.
        jobs: contexts with a seed each.
        prompt: for bases that take text.
        class_label: for class-conditional bases.
        num_inference_steps: denoising steps.
        guidance_scale: the pipeline's default if None.
        resolution: height and width; the pipeline's default if None.
        num_frames: of a clip; the pipeline's default if None.
        batch_size: images per call of the pipeline; half as many from where memory does not suffice for them.

    Raises:
        ValueError: as `generate`.
    """
    check_conditions(base, prompt, class_label, guidance_scale, resolution)
    base.check_steps(num_inference_steps)
    base.check_frames(num_frames)
    numbers = {"num_inference_steps": num_inference_steps, "batch_size": batch_size, "resolution": resolution}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserValueError(f"{name}={number} must be at least 1.")
    adapted = bool(conditionings(base.pipe))
    options = dict(base.sampling_options)
    if resolution is not None and not base.fixed_size:
        options |= {"height": resolution, "width": resolution}
    if num_frames is not None:
        options["num_frames"] = num_frames

    def images(batch: Sequence[tuple[Context, int]]) -> Tensor:
        own = [context for context, _ in batch]
        guidance = {} if guidance_scale is None else base.guidance_options(guidance_scale, len(batch))
        with (
            eval_mode(base.denoiser),
            _no_progress_bars(base.pipe),
            # intervene() refuses targets without an adapter.
            intervene(base.pipe, own) if adapted or any(own) else nullcontext(),
            _class_label(base, class_label),
        ):
            output = cast(Any, base.pipe)(
                **_conditions(base, len(batch), prompt, class_label),
                **options,
                **guidance,
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                num_inference_steps=num_inference_steps,
                output_type="pt",
            )
        return (output.frames if base.is_video else output.images).float().cpu()

    start = 0
    while start < len(jobs):
        rows = min(batch_size, len(jobs) - start)
        try:
            made = images(jobs[start : start + rows])
        except (RuntimeError, MemoryError) as error:
            # Of several processes with pieces of the base, all must make the same calls.
            if rows == 1 or not is_out_of_memory(error) or torch.distributed.is_initialized():
                raise
            batch_size = rows // 2
            warnings.warn(f"Memory does not suffice for {rows} images at once: trying {batch_size}.", stacklevel=2)
            continue
        start += rows
        if not made.isfinite().all():
            warnings.warn(
                "Images hold NaN or infinite values, and are black there. In float16 some bases overflow: take "
                "bfloat16 or float32 (--dtype). If that does not help, the adapter diverged: look at its training.png.",
                stacklevel=2,
            )
        yield made


def check_conditions(
    base: DiffusionBase,
    prompt: str | None,
    class_label: int | None,
    guidance_scale: float | None,
    resolution: int | None,
) -> None:
    """Refuse what a pipeline cannot be called with.

    Raises:
        ValueError: with what the base takes.
    """
    name = type(base.pipe).__name__
    if prompt is not None and not base.takes_captions:
        raise UserValueError(f"prompt={prompt!r} was given, but {name} takes no captions. Leave it out.")
    if class_label is not None and not base.takes_classes:
        raise UserValueError(f"class_label={class_label!r} was given, but this base has no classes. Leave it out.")
    if base.num_classes is not None and (class_label is None or not 0 <= class_label < base.num_classes):
        raise UserValueError(
            f"class_label={class_label!r}, but this base is conditioned on classes 0 to {base.num_classes - 1}. Pass "
            "one of them."
        )
    if guidance_scale is not None and not base.takes_guidance:
        raise UserValueError(f"guidance_scale={guidance_scale} was given, but {name} has no guidance. Leave it out.")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UserValueError(f"guidance_scale={guidance_scale} must be a finite number, such as 7.5.")
    if base.fixed_size and resolution not in (None, base.default_resolution):
        raise UserValueError(
            f"resolution={resolution} was given, but {name} generates {base.default_resolution} pixels only. Leave it "
            "out, and train at that resolution."
        )
    if resolution is not None and resolution % base.size_multiple:
        raise UserValueError(
            f"resolution={resolution} was given, but {name} needs a multiple of {base.size_multiple}. Round it."
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A model in eval mode, and as before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _no_progress_bars(pipe: Any) -> Iterator[None]:
    bars = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**bars)


def _conditions(base: DiffusionBase, rows: int, prompt: str | None, class_label: int | None) -> dict[str, Any]:
    if base.condition_argument is None:
        return {"batch_size": rows}
    return {base.condition_argument: [class_label if base.takes_classes else prompt or ""] * rows}


@contextmanager
def _class_label(base: DiffusionBase, label: int | None) -> Iterator[None]:
    """Give the denoiser a class label that its pipeline has no argument for."""
    if label is None or base.condition_argument is not None:
        yield
        return

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        labels = torch.full((args[0].shape[0],), label, device=args[0].device)
        return args, {**kwargs, "class_labels": labels}

    handle = base.denoiser.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
