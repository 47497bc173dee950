"""The settings of an adapter's training, under the argument names of diffusers' training scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
from .optimization_arguments import OptimizationArguments

# Which noise a denoiser is for -> its name, in pipelines that have two.
NOISE_EXPERTS = {"high": "transformer", "low": "transformer_2"}

# What a run did that is older than an argument, where that is not the argument's default.
OLDER_RUNS = {"observational_rank": 0, "observational_steps": 0}


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

    def _minima(self) -> dict[str, float]:
        return {"concept_rank": 1, "observational_rank": 0, "observational_steps": 0, **super()._minima()}


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
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise UserValueError(f"--snr_gamma={self.snr_gamma} must be positive: with 0, every loss is 0. 5 is usual.")
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

    def _minima(self) -> dict[str, float]:
        return {
            "resolution": 1,
            "num_frames": 1,
            "dataloader_num_workers": 0,
            "text_encoder_rank": 1,
            "num_validation_images": 0,
            "num_inference_steps": 1,
            **super()._minima(),
        }


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

    def _minima(self) -> dict[str, float]:
        return {"num_validation_texts": 0, "max_new_tokens": 1, "max_length": 2, **super()._minima()}
