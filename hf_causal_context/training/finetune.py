"""The main job: a pretrained diffusion pipeline and interventional data -> an adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..adapter.config import CausalContextConfig
from ..bases.families import Base
from ..bases.gap import BaseGap
from ..bases.loading import check_base, load_base
from ..bases.names import lasting_name
from ..data import InterventionalData, check_data
from ..data.from_arguments import load_data
from ..hub.card import write_card
from ..hub.contents import CardContents
from ..inference.sampling import check_conditions, generate
from ..layers import Mechanism
from .arguments import AdapterArguments, TrainingArguments
from .data_record import record_data
from .denoiser.batches import DenoiserBatches
from .denoiser.features import denoiser_features
from .denoiser.gap import NUM_ROWS, denoiser_gap
from .denoiser.losses import denoising_losses
from .denoiser.objectives import denoising_objective
from .gap_report import record_gap, report_gap
from .grids import grid_name, validation_contexts, write_grid
from .loop.memory import memory_for_base
from .loop.processes import main_process_first, make_accelerator
from .loop.sharding import shard_base
from .loop.trainer import fit
from .observational import observational_samples, settle_observational_steps
from .publishing import published
from .reweighting import add_reweighted_contexts

_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(arguments: TrainingArguments, base: Base | None = None, data: InterventionalData | None = None) -> Path:
    """Fine-tune an adapter on a frozen base and return the folder that holds it.

    Args:
        arguments: the settings; `hf-causal-context train` makes them from its command line.
        base: a base that is loaded already, instead of the one that `arguments` name.
        data: data that is loaded already, instead of what `arguments` name.

    Raises:
        ValueError: for data that cannot be trained on, or arguments that do not fit the base.
        TrainingDivergedError, TrainingMemoryError, TrainingInterrupted, CheckpointError, FileNotFoundError: see `fit`.
        ValueError, OSError: with `push_to_hub`, see `published`.
    """
    accelerator = make_accelerator(arguments)
    return published(accelerator, arguments, partial(_fine_tune, accelerator, arguments, base, data))


def _fine_tune(
    accelerator: Accelerator, arguments: TrainingArguments, base: Base | None, data: InterventionalData | None
) -> Path:
    if base is None:
        check_base(arguments.pretrained_model_name_or_path, arguments.revision)
    data = data if data is not None else load_data(arguments)
    if accelerator.is_main_process:
        report = check_data(data)
        print(report.table(), flush=True)
        report.raise_for_errors()
    base = base or load_base(
        arguments.pretrained_model_name_or_path,
        revision=arguments.revision,
        variant=arguments.variant,
        torch_dtype=_DTYPES[accelerator.mixed_precision],  # of the frozen weights; the adapter's are float32
    )
    check_conditions(base, None, 0 if base.takes_classes else None, None, arguments.resolution)
    with memory_for_base(accelerator.device, arguments):
        base.move_encoders(accelerator.device)
        if not arguments.shard_base:  # else a device may be too small for it
            base.denoiser.to(accelerator.device)
    set_seed(arguments.seed)  # the adapter's initial weights
    model = attach_adapter(base.denoiser, data, arguments)
    if arguments.gradient_checkpointing:
        base.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    if arguments.reweighted_contexts:
        with main_process_first(accelerator, Path(arguments.output_dir)):  # it estimates what the others read
            look = partial(_features, base, model, data, arguments.resolution)
            made_from = {"resolution": arguments.resolution}
            data = add_reweighted_contexts(data, arguments, accelerator, look, made_from)
    num_steps = arguments.max_train_steps or arguments.num_train_epochs * _steps_per_epoch(
        data, arguments, accelerator.num_processes
    )
    arguments = settle_observational_steps(arguments, num_steps)
    objective = denoising_objective(base, arguments.snr_gamma)
    with main_process_first(accelerator, Path(arguments.output_dir)):  # it fills the cache that the others read
        batches = DenoiserBatches(
            base,
            data,
            arguments,
            num_steps * arguments.gradient_accumulation_steps,
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
        )
    validation = validation_contexts(arguments, arguments.observational_name, data.concepts, data.held_out)
    with main_process_first(accelerator, Path(arguments.output_dir)):  # it measures, and the others wait
        gap = report_gap(accelerator, arguments, partial(_gap, accelerator, base, batches, arguments.seed))
    validates = bool(arguments.num_validation_images or arguments.validation_steps)
    here = validates and (accelerator.is_main_process or arguments.shard_base)
    measured = (data.held_out or data.contexts) if here else ()
    losses = denoising_losses(accelerator, base, model, batches, arguments, tuple(measured), bool(data.held_out))
    resting = accelerator.device if data.streaming else torch.device("cpu")
    base.move_encoders(resting)

    def begin(first: int) -> dict[str, float]:
        losses.begin(first)
        return record_gap(gap, Path(arguments.output_dir))

    def validate(step: int) -> None:
        losses.tell(step)
        if arguments.num_validation_images:
            show(step)

    def show(step: int) -> None:
        base.move_encoders(accelerator.device)
        try:
            rows = generate(
                base,
                validation,
                seeds=range(arguments.num_validation_images),
                prompt=arguments.validation_prompt if base.takes_captions else None,
                class_label=0 if base.takes_classes else None,
                num_inference_steps=arguments.num_inference_steps,
                resolution=arguments.resolution,
            )
        finally:
            base.move_encoders(resting)
        write_grid(accelerator, arguments.output_dir, rows, validation, arguments.observational_name, step)

    if arguments.shard_base:
        with memory_for_base(accelerator.device, arguments):
            shard_base(model, accelerator.device)
    if arguments.compile:
        base.denoiser.compile()
    wanted = validate if validates else None
    ordered = partial(batches, num_observational=observational_samples(arguments, accelerator.num_processes))
    folder = fit(accelerator, model, objective, ordered, arguments, num_steps, wanted, begin=begin)
    grid = grid_name(num_steps)
    if accelerator.is_main_process:
        record_data(data, folder)
        CardContents(
            name=folder.resolve().name,
            library="diffusers",
            base=lasting_name(arguments.pretrained_model_name_or_path),
            pipeline_tag=base.pipeline_tag,
            call=base.stock_call(prompt=arguments.validation_prompt, class_label=0, resolution=arguments.resolution),
            revision=arguments.revision,
            variant=arguments.variant,
            grid=grid if (folder / grid).exists() else None,
        ).save(folder)
        write_card(folder)
    return folder


def attach_adapter(
    base: nn.Module, data: InterventionalData, arguments: AdapterArguments, task_type: str | None = None
) -> PeftModel:
    """Inject a fresh adapter into a denoiser or a language model, in place.

    `task_type` is PEFT's, of language models: it tells how the adapter is loaded, and that it generates.
    """
    config = CausalContextConfig(
        concepts=data.concepts.names,
        concept_rank=arguments.concept_rank,
        observational_rank=arguments.observational_rank,
        mechanism=cast(Mechanism, arguments.mechanism),
        anchored=arguments.anchored,
        target_modules=arguments.target_modules,
        task_type=task_type,
        revision=arguments.revision,
    )
    model = cast(PeftModel, get_peft_model(cast(Any, base), config))
    # PEFT looks at the model only, such as a denoiser.
    config.base_model_name_or_path = lasting_name(arguments.pretrained_model_name_or_path)
    return model


def _gap(accelerator: Accelerator, base: Base, batches: DenoiserBatches, seed: int) -> BaseGap:
    """How far the base is from the observational set."""
    with accelerator.autocast():
        return denoiser_gap(base, batches.few("", NUM_ROWS), seed)


def _features(base: Base, model: nn.Module, data: InterventionalData, resolution: int | None, rows: Dataset) -> Tensor:
    """What the base sees in the pictures of rows, (N, D)."""
    pictures = rows[data.content_column]
    return denoiser_features(base, model, pictures, resolution or base.default_resolution, len(data.concepts))


def _steps_per_epoch(data: InterventionalData, arguments: TrainingArguments, num_processes: int) -> int:
    if data.counts is None:
        raise ValueError("A stream has no known length, so it has no epochs. Give --max_train_steps.")
    return arguments.steps_per_epoch(sum(data.counts.values()), num_processes)
