"""The paper's own setting: images in contexts -> a `ContextAutoencoder`, end-to-end or on a pretrained base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch.nn.modules.batchnorm import _BatchNorm

from ...bases.names import check_there, why_unread
from ...contexts import ConceptSet
from ...data import InterventionalData, check_data
from ...data.arguments import refuse_useless
from ...data.from_arguments import load_data
from ...errors import UserValueError
from ...messages.progress import say
from ...messages.wording import quoted
from ...models.context_autoencoder import ContextAutoencoder
from ...models.encoder_decoders import KLAutoencoder
from ..data_record import record_images, tell_changed_data
from ..grids import validation_contexts, write_grid
from ..loop.checkpoints import check_start, earlier_run
from ..loop.corruption import begun_steps
from ..loop.early_stopping import EarlyStopping
from ..loop.loss_record import kinds_of_contexts
from ..loop.optimization import unfinished_warm_up
from ..loop.processes import make_accelerator
from ..loop.trainer import fit
from ..weights import parse_weights
from .arguments import AutoencoderArguments
from .images import ImageBatches, ImageSet, to_floats
from .objective import AutoencoderObjective, ImageBatch, TrainingMode, bits_per_dimension

_VALIDATED_AT_ONCE = 512


def train_autoencoder(
    arguments: AutoencoderArguments,
    images: ImageSet | None = None,
    validation: ImageSet | None = None,
    model: ContextAutoencoder | None = None,
    objective_class: type[AutoencoderObjective] = AutoencoderObjective,
) -> Path:
    """Train a `ContextAutoencoder` and return the folder that `from_pretrained` loads it from.

    Args:
        arguments: the settings; `hf-causal-context train-autoencoder` makes them from its command line.
        images: what to train on, instead of the data that `arguments` name.
        validation: other rows; by default `validation_fraction` of `images`.
        model: a model to train, instead of one that `arguments` describe; afterwards it is in eval mode.
        objective_class: the loss to train with, for a subclass of one's own.

    Raises:
        ValueError: for data that cannot be trained on, or arguments that do not fit the model.
        FileExistsError: for a folder with checkpoints of another run.
        TrainingDivergedError, TrainingMemoryError, TrainingInterrupted, CheckpointError, FileNotFoundError: see `fit`.
    """
    accelerator = make_accelerator(arguments)
    goes_on = check_start(arguments, accelerator.num_processes)
    set_seed(arguments.seed)  # the initial weights
    source = _load_images(arguments) if images is None else images
    concepts, held_out = source.concepts, () if isinstance(source, ImageSet) else tuple(source.held_out)
    model = model or make_autoencoder(arguments, concepts)
    # Before images are read, which takes long.
    _check_settings(model, arguments)
    shown = validation_contexts(arguments, arguments.observational_name, concepts, held_out)
    concepts.mask(shown)  # refuses strengths of an observational part, which adapters have
    objective = objective_class(
        model,
        arguments.reconstruction,
        arguments.beta,
        arguments.group_penalty,
        arguments.l2_penalty,
        arguments.mean_penalty or 0.0,
    )
    images = source if isinstance(source, ImageSet) else _read_images(source, model, accelerator.is_main_process)
    if validation is None:
        images, validation = images.split(arguments.validation_fraction, arguments.seed)
    _check_fit(model, images, arguments)
    _check_validation(model, validation)
    model.to(accelerator.device)
    num_steps = arguments.max_train_steps or arguments.num_train_epochs * arguments.steps_per_epoch(
        len(images.contexts), accelerator.num_processes
    )
    batches = ImageBatches(
        images,
        arguments,
        num_steps * arguments.gradient_accumulation_steps,
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
    )
    if problem := unfinished_warm_up(arguments, num_steps):
        raise UserValueError(problem)

    def validate(step: int) -> float:
        error, kl = mean_loss(objective, model, validation)
        values = {"validation_reconstruction": error, "validation_kl": kl}
        if arguments.reconstruction == "bce":
            values["validation_bits_per_dimension"] = bits_per_dimension(error + kl, model.backbone)
        accelerator.log(values, step=step)
        if arguments.num_validation_images:
            rows = [
                model.sample(context, arguments.num_validation_images, torch.Generator().manual_seed(arguments.seed))
                for context in shown
            ]
            labels = [str(context) or arguments.observational_name for context in shown]
            write_grid(accelerator, arguments.output_dir, rows, labels, step)
        return error + arguments.beta * kl

    earlier = earlier_run(arguments)

    def begin(first: int) -> dict[str, float]:
        counts, digest = images.counts, images.digest
        tell_changed_data(counts, digest, earlier)
        record_images(counts, digest, Path(arguments.output_dir))
        return {}

    if arguments.compile:
        for name, part in model.named_modules():
            if name.rpartition(".")[2] in ("encoder", "decoder", "context_module"):  # what is called as a whole
                part.compile()
    stopping = None
    if arguments.early_stopping_patience is not None:
        stopping = EarlyStopping(arguments.early_stopping_patience, arguments.early_stopping_min_delta)
    kinds = kinds_of_contexts(images.concepts, images.names, arguments.observational_name)
    mode = TrainingMode(model, arguments.mode, begun_steps(goes_on, num_steps))
    try:
        return fit(
            accelerator,
            model,
            objective,
            batches,
            arguments,
            num_steps,
            validate,
            stopping,
            begin=begin,
            hooks=mode,
            kinds=kinds,
        )
    finally:
        mode.end()


def _load_images(arguments: AutoencoderArguments) -> InterventionalData:
    data = load_data(arguments)
    if data.has_videos:
        raise UserValueError(
            "An autoencoder is trained on images, and the data holds videos. Give images, and leave --num_frames out."
        )
    refuse_useless(arguments, ["num_frames"], "The data are images")
    if data.has_masks:
        raise UserValueError(
            "An autoencoder's loss has no masks. Leave --mask_column out, or take the files *.mask.png away."
        )
    return data


def _read_images(data: InterventionalData, model: ContextAutoencoder, say_report: bool) -> ImageSet:
    if model.backbone.channels not in (1, 3):
        raise UserValueError(
            f"The autoencoder takes images of {model.backbone.channels} channels, and images are read in gray (1) or "
            "RGB (3). Choose another --base, or pass images= of your own."
        )
    report = check_data(data)
    if say_report:
        say(report.table(), report.remarks())
    report.raise_for_errors()
    return ImageSet.of_data(data, model.backbone.size, model.backbone.channels)


def make_autoencoder(arguments: AutoencoderArguments, concepts: ConceptSet) -> ContextAutoencoder:
    """Return a fresh autoencoder, or a fresh context module around the encoder and decoder of a pretrained one.

    Raises:
        ValueError: for no base where the mode needs one, or one that holds no autoencoder we know, or of other images.
        OSError: for a base that does not exist.
    """
    base: Any = {"class": arguments.architecture, "size": arguments.resolution, "channels": arguments.channels}
    latent_module = "top" if arguments.architecture == "HierarchicalVAE" else None
    if arguments.mode != "end-to-end" and arguments.base is None:
        raise UserValueError(
            f"--mode={arguments.mode} starts from an autoencoder. Give it: --base, a folder or a Hub id; for example "
            "one trained with --without_context_module."
        )
    if arguments.base is not None:
        check_there(arguments.base)
        try:
            config = cast(dict[str, Any], ContextAutoencoder.load_config(arguments.base))
        except (OSError, ValueError) as error:
            raise UserValueError(
                f"--base={arguments.base} has no autoencoder's config.json. {why_unread(arguments.base, error)} Give a "
                "ContextAutoencoder or a diffusers AutoencoderKL; of a pipeline's folder, its folder vae."
            ) from error
        kind = config.get("_class_name")
        if kind == "ContextAutoencoder":
            pretrained = ContextAutoencoder.from_pretrained(arguments.base)
            base, latent_module = pretrained.backbone, pretrained.latent_module
        elif kind == "AutoencoderKL":
            vae = cast(AutoencoderKL, AutoencoderKL.from_pretrained(arguments.base))
            base = KLAutoencoder(64 if arguments.resolution is None else arguments.resolution, vae)
        else:
            raise UserValueError(
                f"--base={arguments.base} holds a {kind}. It must be a ContextAutoencoder or a diffusers AutoencoderKL."
            )
        for name, own in (("resolution", base.size), ("channels", base.channels)):
            if getattr(arguments, name) not in (None, own):
                raise UserValueError(
                    f"--{name}={getattr(arguments, name)}, but --base={arguments.base} is for {name} {own}. Leave it "
                    "out, or start from another base."
                )
    return ContextAutoencoder(
        concepts.names,
        base,
        noise_width=arguments.noise_width,
        concept_width=arguments.concept_width,
        depth=arguments.depth,
        published=arguments.published,
        with_context_module=not arguments.without_context_module,
        ignore_contexts=arguments.ignore_contexts,
        latent_module=latent_module,
    )


@torch.no_grad()
def mean_loss(objective: AutoencoderObjective, model: ContextAutoencoder, images: ImageSet) -> tuple[float, float]:
    """Mean reconstruction error and KL divergence of all images, in nats, on the model's device."""
    sums = torch.zeros(2, dtype=torch.float64)
    chunks = zip(images.images.split(_VALIDATED_AT_ONCE), images.masks().split(_VALIDATED_AT_ONCE), strict=True)
    for number, (some, mask) in enumerate(chunks):
        generator = torch.Generator(model.device).manual_seed(number)
        batch = ImageBatch(to_floats(some.to(model.device)), mask.to(model.device), generator)
        sums += torch.stack(objective.parts(model, batch)).sum(1).cpu()
    error, kl = (sums / len(images.contexts)).tolist()
    return error, kl


def _check_settings(model: ContextAutoencoder, arguments: AutoencoderArguments) -> None:
    """Refuse a model that is not as the arguments say, batches it does not learn from, and grids that no file shows."""
    settings = {
        "published": (model.published, arguments.published),
        "ignore_contexts": (model.ignore_contexts, arguments.ignore_contexts),
        "without_context_module": (not model.with_context_module, arguments.without_context_module),
    }
    for name, (own, given) in settings.items():
        if own != given:
            raise UserValueError(f"The autoencoder has {name}={own}, the arguments {given}. Give both the same.")
    if arguments.train_batch_size == 1 and any(isinstance(part, _BatchNorm) for part in model.modules()):
        raise UserValueError("--train_batch_size=1: batch norm compares the images of a batch. Give 2 or more.")
    if arguments.num_validation_images and model.backbone.channels not in (1, 3):
        raise UserValueError(
            f"Grids of samples show gray or RGB images, and the autoencoder's have {model.backbone.channels} channels. "
            "Give --num_validation_images 0."
        )


def _check_fit(model: ContextAutoencoder, images: ImageSet, arguments: AutoencoderArguments) -> None:
    if model.concept_set != images.concepts:
        raise UserValueError(
            f"The autoencoder's concepts are {quoted(model.concept_set)}, the data's {quoted(images.concepts)}. They "
            "must be the same, in the same order."
        )
    model.check_images(to_floats(images.images[:1]))
    needed = {"", *images.concepts} if model.with_context_module and not model.ignore_contexts else set()
    if missing := sorted(needed - set(images.names)):
        raise UserValueError(
            f"There are no images of {quoted(missing)} ('' is the observational context), so nothing says what the "
            f"context means. There are images of {quoted(images.names)}. Add a set, or remove the concept."
        )
    shares = parse_weights(arguments.context_weights, arguments.observational_name)
    if unseen := sorted(name or arguments.observational_name for name in needed if shares.get(name) == 0):
        raise UserValueError(
            f"--context_weights {' '.join(f'{name}=0' for name in unseen)} leaves out sets that say what the contexts "
            "mean: the observational one, and one for each concept alone. Leave it out, or make it small, such as 0.1."
        )


def _check_validation(model: ContextAutoencoder, validation: ImageSet) -> None:
    if model.concept_set != validation.concepts:
        raise UserValueError(
            f"The concepts of the images to validate on are {quoted(validation.concepts)}, and those to train on "
            f"{quoted(model.concept_set)}. They must be the same, in the same order."
        )
    if not len(validation.images):
        raise UserValueError("There are no images to validate on. Give some, or leave validation= out.")
    model.check_images(to_floats(validation.images[:1]))
