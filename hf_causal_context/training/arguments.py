"""The settings of a training run, under the argument names of diffusers' training scripts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .._files import ARGUMENTS
from ..adapter.storage.fields import check_share
from ..bases.gguf import check_gguf
from ..bases.quantization import QUANTIZATIONS, check_quantization
from ..data.arguments import (
    ContextDataArguments,
    DataArguments,
    ImageReadingArguments,
    TextDataArguments,
    TextReadingArguments,
    argument,
    refuse_useless,
)
from ..errors import UserValueError
from ..layers import MECHANISMS
from .optimizers import OPTIMIZERS, optimizer_by_name

LR_SCHEDULERS = (
    *("constant", "constant_with_warmup", "linear", "polynomial"),
    *("cosine", "cosine_with_min_lr", "cosine_with_restarts"),
)

# Which noise a denoiser is for -> its name, in pipelines that have two.
NOISE_EXPERTS = {"high": "transformer", "low": "transformer_2"}

# What a run did that is older than an argument, where that is not the argument's default.
OLDER_RUNS = {"observational_rank": 0, "observational_steps": 0}


@dataclass
class OptimizationArguments:
    """How any model of this package is trained, checkpointed and watched.

    Raises:
        ValueError: for a number out of range, or an unknown name.
        ImportError: for an optimizer whose package is not installed.
    """

    output_dir: str = argument("", "Required. Folder for the result, its checkpoints and samples.")

    train_batch_size: int = argument(16, "Samples per step and process.")
    gradient_accumulation_steps: int = argument(1, "Batches per optimizer step.")
    max_train_steps: int | None = argument(None, "Optimizer steps; overrides num_train_epochs.")
    num_train_epochs: int = argument(100, "Passes over the data.")
    learning_rate: float = argument(1e-4, "Peak learning rate.")
    lr_scheduler: str = argument("constant", "One of: " + ", ".join(LR_SCHEDULERS) + ".")
    lr_warmup_steps: int = argument(0, "Optimizer steps of warm-up.")
    optimizer: str = argument("adamw", "One of: " + ", ".join(OPTIMIZERS) + ".")
    optimizer_args: list[str] = argument(
        [], "Further settings of another optimizer than adamw, such as weight_decay=0.01 'betas=(0.9, 0.99)'."
    )
    adam_beta1: float = argument(0.9, "adamw and adamw8bit.")
    adam_beta2: float = argument(0.999, "adamw and adamw8bit.")
    adam_weight_decay: float = argument(1e-2, "adamw and adamw8bit.")
    adam_epsilon: float = argument(1e-8, "adamw and adamw8bit.")
    max_grad_norm: float = argument(1.0, "Gradients are clipped to this norm.")
    use_ema: bool = argument(False, "Average the trained weights over steps; the average is what is saved.")
    ema_decay: float = argument(0.999, "Largest decay of that average.")
    mixed_precision: str | None = argument(None, "no, fp16 or bf16; by default what accelerate was told.")
    compile: bool = argument(False, "Compile the model with torch.compile; pays off on a GPU.")
    seed: int = argument(0, "Of the initial weights, the order of the data and the noise.")

    validation_steps: int | None = argument(None, "Optimizer steps between validations; by default only at the end.")
    validation_contexts: list[str] | None = argument(
        None, "Contexts of the samples; by default obs, every single concept, held-out contexts (or some pairs)."
    )
    checkpointing_steps: int = argument(500, "Optimizer steps between checkpoints.")
    checkpoints_total_limit: int | None = argument(None, "How many checkpoints are kept.")
    resume_from_checkpoint: str | None = argument(None, "A checkpoint's folder, or latest.")
    report_to: str | None = argument(None, "Tracker: tensorboard, wandb, trackio ...")
    logging_dir: str = argument("logs", "Folder of the tracker inside output_dir.")

    def __post_init__(self) -> None:
        for name, minimum in _MINIMA.items():
            value = getattr(self, name, None)
            if value is not None and not value >= minimum:
                raise UserValueError(f"--{name}={value} must be at least {minimum}.")
        for name, most in (("learning_rate", torch.finfo(torch.float32).max), ("max_grad_norm", math.inf)):
            if not 0 < getattr(self, name) <= most:
                raise UserValueError(f"--{name}={getattr(self, name)} must be positive, and at most {most:g}.")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserValueError(f"--{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not self.output_dir:
            raise UserValueError("Missing: --output_dir. Give the folder for the results.")
        for name, allowed in self._choices().items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise UserValueError(f"--{name}={getattr(self, name)} is unknown. Allowed: {listed}.")

        if self.optimizer == "adamw" and self.optimizer_args:
            raise UserValueError(
                f"--optimizer_args={self.optimizer_args} with --optimizer=adamw: its settings are --adam_beta1, "
                "--adam_beta2, --adam_weight_decay and --adam_epsilon."
            )
        if self.optimizer == "prodigy" and self.learning_rate < 0.01:
            raise UserValueError(
                f"--optimizer=prodigy finds the learning rate, and multiplies it by --learning_rate="
                f"{self.learning_rate}: nothing would be learned. Give --learning_rate 1."
            )
        if self.optimizer == "schedulefree" and (self.use_ema or not self.lr_scheduler.startswith("constant")):
            raise UserValueError(
                "--optimizer=schedulefree averages the weights itself, in place of a schedule. Leave --use_ema out, "
                f"and --lr_scheduler={self.lr_scheduler} too."
            )
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            refuse_useless(
                self, ["lr_warmup_steps"], "Only --lr_scheduler=constant_with_warmup warms a constant rate up"
            )
        if not self.optimizer.startswith("adamw"):
            own = f"--optimizer={self.optimizer} has its settings in --optimizer_args"
            refuse_useless(self, ["adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"], own)
        if not self.use_ema:
            refuse_useless(self, ["ema_decay"], "--use_ema was not given")
        if self.report_to is None:
            refuse_useless(self, ["logging_dir"], "--report_to was not given")
        optimizer_by_name(self.optimizer, [torch.zeros(1)], self.optimizer_args)  # refused before anything is loaded

    def _choices(self) -> dict[str, tuple[str | None, ...]]:
        return {
            "lr_scheduler": LR_SCHEDULERS,
            "optimizer": (*OPTIMIZERS,),
            "mixed_precision": (None, "no", "fp16", "bf16"),
        }

    def steps_per_epoch(self, rows: int, num_processes: int = 1) -> int:
        """Optimizer steps in which as many samples are drawn as there are rows."""
        samples = self.train_batch_size * self.gradient_accumulation_steps * num_processes
        return max(1, math.ceil(rows / samples))

    def save(self, folder: Path) -> None:
        """Write training_arguments.json: as `--config` of the command it repeats the run, wherever that was resumed."""
        settings = dataclasses.asdict(self) | {"resume_from_checkpoint": None}
        (folder / ARGUMENTS).write_text(json.dumps(settings, indent=2) + "\n")


@dataclass
class AdapterArguments(OptimizationArguments, ContextDataArguments):
    """What the adapters of all kinds of bases have in common.

    Raises:
        ValueError: for a number out of range, without a base, or for options that contradict each other.
    """

    pretrained_model_name_or_path: str = argument("", "Required. The base, as a folder or a Hub id.")
    revision: str | None = argument(None, "Revision of the base on the Hub.")
    mechanism: str = argument("independent", "How concepts act: " + ", ".join(MECHANISMS) + ".")
    concept_rank: int = argument(4, "Width of each concept; the adapter's rank is concepts x width.")
    observational_rank: int | None = argument(
        None,
        "Rank of what is on in every context and learns what the data differs from the base by; by default 4 x "
        "concept_rank. 0 for a base that was trained on the observational set.",
    )
    observational_steps: int | None = argument(
        None,
        "Optimizer steps at the beginning that train on the observational set alone, so that the concepts find that "
        "difference learned; by default a fifth of the run.",
    )
    dropout: float = argument(0.0, "Share of a module's input features that the adapter does not see in a step.")
    target_modules: list[str] | None = argument(None, "Modules to adapt; by default the base's attention.")
    anchored: bool = argument(False, "Let concepts add nothing in the empty context (always so for 'independent').")
    gradient_checkpointing: bool = argument(False, "Save memory by computing activations again.")
    quantization: str | None = argument(
        None, "Bits of the frozen base's weights: " + ", ".join(QUANTIZATIONS) + "; the adapter keeps all of its own."
    )
    gguf_file: str | None = argument(
        None,
        "GGUF file with the frozen weights of the transformer or language model, instead of the base's own: a path, or "
        "user/repository/file.gguf on the Hub.",
    )
    shard_base: bool = argument(False, "Cut the frozen base into one piece per process (FSDP2): for large bases.")
    reweighted_contexts: list[str] = argument(
        [], "Combinations also trained on rows drawn from the single interventions: pairs, all, or a list of them."
    )
    validation_prompt: str = argument("", "Prompt of samples, for bases that take text; by default instance_prompt.")
    dry_run: bool = argument(False, "Say what the run will take in memory and time, from a few steps; write nothing.")
    push_to_hub: bool = argument(False, "Push the finished adapter to the Hub, with samples and a card.")
    hub_model_id: str | None = argument(None, "Its repository, user/name; by default the name of output_dir.")

    def __post_init__(self) -> None:
        required = ("pretrained_model_name_or_path", "output_dir")
        if missing := ", ".join(f"--{name}" for name in required if not getattr(self, name)):
            raise UserValueError(f"Missing: {missing}. Give the base and the folder for the results.")
        super().__post_init__()
        check_share("--dropout", self.dropout)
        if self.reweighted_contexts and self.streaming:
            raise UserValueError(
                "--reweighted_contexts draws rows by number, which a stream has not. Leave --streaming or it out."
            )
        if self.reweighted_contexts and self.shard_base:
            raise UserValueError(
                "--reweighted_contexts looks at rows with a whole base in one process. Leave --shard_base or it out."
            )
        if self.observational_rank == 0 and self.observational_steps:
            raise UserValueError(
                f"--observational_steps={self.observational_steps} would train nothing, since there is no "
                "observational part (--observational_rank=0). Leave one of them out."
            )
        fewer_bits = "--quantization" if self.quantization else "--gguf_file"
        if (self.quantization or self.gguf_file) and self.shard_base:
            raise UserValueError(
                f"{fewer_bits} and --shard_base are two ways to fit a large base, not made to work together. "
                "Leave one of them out."
            )
        if not self.push_to_hub:
            refuse_useless(self, ["hub_model_id"], "--push_to_hub was not given")
        check_quantization(self.quantization)
        check_gguf(self.gguf_file, self.quantization)
        if self.push_to_hub and self.shard_base:
            raise UserValueError(
                "--push_to_hub makes samples with a whole base on one device. Leave it out, and push the adapter "
                "afterwards, where a whole base fits (hf-causal-context push)."
            )
        if self.compile and self.shard_base:
            raise UserValueError("--compile was not made to work with --shard_base. Leave one of them out.")

    def _choices(self) -> dict[str, tuple[str | None, ...]]:
        return {"mechanism": MECHANISMS, **super()._choices()}


@dataclass
class TrainingArguments(AdapterArguments, DataArguments, ImageReadingArguments):
    """Settings of an adapter's run; `hf-causal-context train --help` prints them with their meaning.

    Raises:
        ValueError: for a number out of range, or options that contradict each other.
    """

    pretrained_model_name_or_path: str = argument("", "Required. Base: a diffusers pipeline, as a folder or a Hub id.")
    variant: str | None = argument(None, "Variant of the base's files, such as fp16.")

    train_text_encoder: bool = argument(
        False, "Adapt the text encoders, too; captions are then encoded in every step, not once."
    )
    text_encoder_learning_rate: float | None = argument(None, "Theirs; by default learning_rate.")
    text_encoder_rank: int | None = argument(None, "Width of each concept in them; by default concept_rank.")
    caption_dropout: float = argument(0.0, "Share of captions replaced by the empty one; class images keep theirs.")
    shuffle_tags: bool = argument(
        False,
        "Put the tags of captions (between commas) in another order for every sample; captions are then encoded in "
        "every step.",
    )
    noise_expert: str | None = argument(
        None, "high or low: which denoiser is trained, of a base that has one for high and one for low noise (Wan 2.2)."
    )
    aspect_ratio_buckets: bool = argument(
        False, "Keep the shapes of images: each is read at the nearest of some sizes of about resolution^2 pixels."
    )
    random_flip: bool = argument(False, "Mirror half of the images, left to right.")
    flip_changes: list[str] = argument(
        [], "Concepts that a mirror would change, such as writing: images of their contexts are never mirrored."
    )
    class_data_dir: str | None = argument(
        None, "Folder of images of the class, for prior preservation: under class_prompt the base shall stay as it is."
    )
    class_prompt: str = argument("", "Their caption, another than those of the data.")
    prior_loss_weight: float = argument(1.0, "Their share of batches, where that of a context is 1.")
    dataloader_num_workers: int = argument(0, "Processes that decode images (not of streams).")

    snr_gamma: float | None = argument(None, "Min-SNR weighting of the loss (5.0 is usual); diffusion bases only.")
    num_validation_images: int = argument(8, "Images per row of a grid; 0 for no grids.")
    num_inference_steps: int = argument(25, "Denoising steps of the grids.")

    def _choices(self) -> dict[str, tuple[str | None, ...]]:
        return {"noise_expert": (None, *NOISE_EXPERTS), **super()._choices()}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validation_prompt = self.validation_prompt or self.instance_prompt  # what the adapter was trained on
        rate = self.text_encoder_learning_rate
        for name in ("text_encoder_learning_rate", "text_encoder_rank"):
            if getattr(self, name) is not None and not self.train_text_encoder:
                raise UserValueError(
                    f"--{name}={getattr(self, name)} is for text encoders that are trained. Add --train_text_encoder, "
                    "or leave it out."
                )
        if rate is not None and not 0 < rate < math.inf:
            raise UserValueError(f"--text_encoder_learning_rate={rate} must be positive, and finite.")
        if rate not in (None, self.learning_rate) and self.optimizer == "prodigy":
            raise UserValueError(
                f"--optimizer=prodigy finds one learning rate for all, so --text_encoder_learning_rate={rate} cannot "
                f"differ from --learning_rate={self.learning_rate}. Leave it out."
            )
        if self.train_text_encoder and self.shard_base:
            raise UserValueError(
                "--shard_base cuts the denoiser only, and was not made to work with --train_text_encoder. Leave one of "
                "them out."
            )
        if not 0 <= self.caption_dropout < 1:
            raise UserValueError(
                f"--caption_dropout={self.caption_dropout} must be at least 0 and below 1: the share of captions that "
                "are left out. 0.1 is usual."
            )
        if self.aspect_ratio_buckets and self.streaming:
            raise UserValueError(
                "--aspect_ratio_buckets looks at the sizes of all images first, which a stream does not tell. Leave it "
                "or --streaming out."
            )
        if (self.class_data_dir is None) != (not self.class_prompt):
            raise UserValueError(
                f"--class_data_dir={self.class_data_dir} and --class_prompt={self.class_prompt!r} belong together. "
                "Give both, or none."
            )
        if self.class_prompt and self.class_prompt == self.instance_prompt:
            raise UserValueError(
                f"--class_prompt={self.class_prompt!r} is --instance_prompt, too. Give another one: it tells images of "
                "the class from the others."
            )
        if self.class_data_dir is not None and self.streaming:
            raise UserValueError("--class_data_dir is read by number, which a stream has not. Leave --streaming out.")
        if self.streaming:
            refuse_useless(self, ["dataloader_num_workers"], "A stream is read in one process")
        if self.class_data_dir is None:
            refuse_useless(self, ["prior_loss_weight"], "--class_data_dir was not given")
        if not 0 < self.prior_loss_weight < math.inf:
            raise UserValueError(f"--prior_loss_weight={self.prior_loss_weight} must be positive. 1 is usual.")
        if not self.random_flip:
            refuse_useless(self, ["flip_changes"], "--random_flip was not given")


@dataclass
class TextArguments(AdapterArguments, TextDataArguments, TextReadingArguments):
    """Settings of a language model's run; `hf-causal-context train-text --help` prints them with their meaning.

    Raises:
        ValueError: for a number out of range, or options that contradict each other.
    """

    pretrained_model_name_or_path: str = argument(
        "", "Required. Base: a causal or encoder-decoder model of transformers, as a folder or a Hub id."
    )
    trainable_tokens: list[str] = argument(
        [], "Tokens whose rows of the embedding are trained, too, such as new ones; in force in every context."
    )
    pad_token: str | None = argument(None, "Token to pad with, where the tokenizer has none; by default the end's.")
    packing: bool = argument(False, "Fill rows with several texts of the same context.")
    validation_prompt: str = argument("", "Prompt of the sample texts.")
    self_composed_contexts: list[str] = argument(
        [],
        "Combinations also trained on texts that the adapter writes itself from two fifths of the run on, where they "
        "show all concepts: pairs, all, or a list of them.",
    )
    num_validation_texts: int = argument(2, "Texts per context at validations; 0 for none.")
    max_new_tokens: int = argument(40, "Length of the sample texts, in tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing and self.streaming:
            raise UserValueError(
                "--packing puts texts together before training, and a stream is read during it. Leave --streaming or "
                "--packing out."
            )
        for name in ("streaming", "shard_base"):
            if self.self_composed_contexts and getattr(self, name):
                raise UserValueError(
                    f"--self_composed_contexts looks at all rows and writes with a whole base, which --{name} does not "
                    "allow. Leave one of them out."
                )


_MINIMA: dict[str, float] = {
    "resolution": 1,
    "num_frames": 1,
    "channels": 1,
    "early_stopping_patience": 1,
    "dataloader_num_workers": 0,
    "concept_rank": 1,
    "text_encoder_rank": 1,
    "observational_rank": 0,
    "observational_steps": 0,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 1,
    "num_train_epochs": 1,
    "lr_warmup_steps": 0,
    "snr_gamma": 0,
    "adam_weight_decay": 0,
    "adam_epsilon": 0,
    "seed": 0,
    "validation_steps": 1,
    "num_validation_images": 0,
    "num_validation_texts": 0,
    "max_new_tokens": 1,
    "max_length": 2,
    "num_inference_steps": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
}
