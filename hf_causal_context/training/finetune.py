"""The main job: a pretrained diffusion pipeline and interventional data -> an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from ..bases.diffusion_base import DiffusionBase
from ..bases.gap import BaseGap
from ..bases.loading import check_base, check_expert, load_base
from ..bases.names import resolve_base_name
from ..data import InterventionalData
from ..data.from_arguments import load_data
from ..errors import UserValueError
from ..hub.contents import CardContents
from ..inference.sampling import check_conditions, generate
from ..messages.progress import say
from .arguments import NOISE_EXPERTS, TrainingArguments
from .context_losses import ContextLosses
from .denoiser.batches import DenoiserBatches
from .denoiser.class_images import class_images
from .denoiser.clips import check_clips, clip_length
from .denoiser.edits import EditObjective
from .denoiser.features import denoiser_features
from .denoiser.flips import Flips
from .denoiser.gap import NUM_ROWS, check_measurable, denoiser_gap
from .denoiser.losses import denoising_losses
from .denoiser.objectives import denoising_objective
from .denoiser.text_encoders import AdaptedPipeline, with_encoders
from .grids import newest_grid, write_grid
from .loop.objective import Objective
from .loop.processes import make_accelerator
from .publishing import train_and_publish
from .recipe import DTYPES, FineTuning, attach_adapter


def train(
    arguments: TrainingArguments, base: DiffusionBase | None = None, data: InterventionalData | None = None
) -> Path:
    """Fine-tune an adapter on a frozen base and return the folder that holds it.

    Args:
        arguments: the settings; `hf-causal-context train` makes them from its command line.
        base: a base that is loaded already, instead of the one that `arguments` name.
        data: data that is loaded already, instead of what `arguments` name.

    Raises:
        ValueError: for data that cannot be trained on, or arguments that do not fit the base.
        TrainingDivergedError, TrainingMemoryError, TrainingInterrupted, CheckpointError, FileNotFoundError: see `fit`.
        ValueError, OSError: with `push_to_hub`, see `train_and_publish`.
    """
    accelerator = make_accelerator(arguments)
    # Made in there, so that it is gone, with its base, when a push loads the base once more.
    return train_and_publish(
        accelerator, arguments, lambda: DenoiserFineTuning(accelerator, arguments, base, data).run()
    )


class DenoiserFineTuning(FineTuning[TrainingArguments]):
    """Fine-tuning of a diffusion pipeline's denoiser."""

    batches: DenoiserBatches

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: TrainingArguments,
        base: DiffusionBase | None,
        data: InterventionalData | None,
    ) -> None:
        super().__init__(accelerator, arguments, data)
        self._base = base

    @property
    def base(self) -> DiffusionBase:
        """The pipeline."""
        assert self._base is not None
        return self._base

    def check_base(self) -> None:
        if self._base is None:
            components = check_base(self.arguments.pretrained_model_name_or_path, self.arguments.revision)
        else:
            components = self._base.pipe.config
        check_expert(components, self.arguments.noise_expert)

    def load_data(self) -> InterventionalData:
        return load_data(self.arguments)

    def check_names(self) -> None:
        super().check_names()
        Flips(self.arguments, self.data.concepts)
        class_images(self.arguments)

    def load_base(self) -> nn.Module:
        arguments = self.arguments
        self._base = self._base or load_base(
            arguments.pretrained_model_name_or_path,
            revision=arguments.revision,
            variant=arguments.variant,
            dtype=DTYPES[self.accelerator.mixed_precision],
            quantization=arguments.quantization,
            gguf_file=arguments.gguf_file,
        )
        if arguments.train_text_encoder and not self.base.takes_captions:
            raise UserValueError(
                f"--train_text_encoder was given, but {type(self.base.pipe).__name__} takes no captions. Leave it out."
            )
        if arguments.noise_expert is not None:
            self.base.use_denoiser(NOISE_EXPERTS[arguments.noise_expert])
        self.num_frames = clip_length(self.base, self.data, arguments)
        check_clips(self.data, self.num_frames)
        if self.num_frames is not None and not self.data.has_videos and self.accelerator.is_main_process:
            say(
                f"The data are images, and {type(self.base.pipe).__name__} makes videos: each is a clip of one frame. "
                "For clips, give files such as .mp4, or folders of frames and --num_frames."
            )
        check_conditions(self.base, None, 0 if self.base.takes_classes else None, None, arguments.resolution)
        if self.num_shown:
            self.base.check_steps(arguments.num_inference_steps)
        return self.base.denoiser

    @property
    def component(self) -> str | None:
        return None if self.arguments.noise_expert is None else self.base.denoiser_name

    def place_base(self) -> None:
        self.base.move_encoders(self.accelerator.device)

    def trained_model(self) -> nn.Module:
        arguments = self.arguments
        if not arguments.train_text_encoder:
            return self.model
        rank = arguments.text_encoder_rank or arguments.concept_rank
        given = replace(arguments, concept_rank=rank, target_modules=None)  # which are the denoiser's
        with self.accelerator.autocast():
            return AdaptedPipeline(
                self.base,
                self.model,
                lambda encoder, unused: attach_adapter(encoder, self.data, given, exclude_modules=unused),
            )

    def feature_extractor(self) -> tuple[Callable[[Dataset], Tensor], dict[str, Any]]:
        self.base.require_images("--reweighted_contexts")
        resolution = self.arguments.resolution
        return partial(_features, self.base, self.data, resolution), {"resolution": resolution}

    def num_rows(self) -> int:
        assert self.data.counts is not None  # no stream
        return sum(self.data.counts.values())

    def make_batches(self, num_batches: int) -> DenoiserBatches:
        device = self.accelerator.device
        self.batches = DenoiserBatches(
            self.base, self.data, self.arguments, num_batches, device, *self.process, self.begun_steps
        )
        return self.batches

    def objective(self) -> Objective:
        objective = denoising_objective(self.base, self.arguments.snr_gamma)
        if self.arguments.train_text_encoder:
            return with_encoders(objective)
        return EditObjective(self.base, objective) if self.data.has_pairs else objective

    def measure_gap(self) -> BaseGap:
        check_measurable(self.base)
        with self.accelerator.autocast():
            return denoiser_gap(self.base, self.batches.few("", NUM_ROWS), self.arguments.seed)

    def losses(self) -> ContextLosses:
        here = self.validates and (self.accelerator.is_main_process or self.arguments.shard_base)
        held_out = bool(self.data.held_out)
        contexts = tuple(self.data.held_out or self.data.contexts) if here else ()
        return denoising_losses(
            self.accelerator, self.base, self.trained, self.batches, self.arguments, contexts, held_out
        )

    def enable_gradient_checkpointing(self) -> None:
        self.base.enable_gradient_checkpointing()
        if isinstance(self.trained, AdaptedPipeline):
            self.trained.enable_gradient_checkpointing()

    def parts(self) -> dict[str, nn.Module]:
        parts = {name: part for name, part in self.base.pipe.components.items() if isinstance(part, nn.Module)}
        return {**parts, self.base.denoiser_name: self.model}

    @property
    def idle_parts(self) -> tuple[str, ...]:
        return () if self.encodes_in_steps else tuple(self.parts().keys() - {self.base.denoiser_name})

    def make_room(self) -> None:
        self.base.move_encoders(self.accelerator.device if self.encodes_in_steps else "cpu")

    @property
    def encodes_in_steps(self) -> bool:
        """Whether steps need the encoders: for rows of a stream, and captions that never come twice."""
        return self.data.streaming or self.arguments.shuffle_tags or self.arguments.train_text_encoder

    @property
    def validates(self) -> bool:
        return bool(self.num_shown or self.arguments.validation_steps)

    @property
    def num_shown(self) -> int:
        return self.arguments.num_validation_images

    def show(self, step: int) -> None:
        base, arguments = self.base, self.arguments
        base.move_encoders(self.accelerator.device)
        sample = partial(
            generate,
            base,
            seeds=range(self.num_shown),
            prompt=arguments.validation_prompt if base.takes_captions else None,
            class_label=0 if base.takes_classes else None,
            num_inference_steps=arguments.num_inference_steps,
            resolution=arguments.resolution,
            num_frames=self.num_frames,
        )
        try:
            rows = self.samples(step, sample)
        finally:
            self.make_room()
        write_grid(self.accelerator, arguments.output_dir, rows, self.labels(step), step)

    def card_contents(self, folder: Path) -> CardContents:
        base, arguments = self.base, self.arguments
        return CardContents(
            name=folder.resolve().name,
            library="diffusers",
            base=resolve_base_name(arguments.pretrained_model_name_or_path),
            pipeline_tag=base.pipeline_tag,
            call=base.stock_call(
                prompt=arguments.validation_prompt,
                class_label=0,
                resolution=arguments.resolution,
                num_frames=self.num_frames,
            ),
            denoiser=base.denoiser_name,
            frame_rate=base.frame_rate if base.is_video else None,
            revision=arguments.revision,
            variant=arguments.variant,
            grid=newest_grid(folder, self.num_steps),
        )


def _features(base: DiffusionBase, data: InterventionalData, resolution: int | None, rows: Dataset) -> Tensor:
    """Return what the base sees in the images of rows, (N, D)."""
    images = rows[data.content_column]
    return denoiser_features(base, images, resolution or base.default_resolution)
