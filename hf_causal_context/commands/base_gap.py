"""How far a base is from the data that `hf-causal-context check-data` looks at."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..bases.gap import BaseGap
from ..bases.language import load_language_model, load_tokenizer
from ..bases.loading import load_base
from ..bases.token_batches import Collation, cut_rows
from ..bases.tokens import Tokenization, TokenRow, check_learned, row_length
from ..data import InterventionalData
from ..data.arguments import ComparedDataArguments
from ..data.checks import STREAM_ROWS
from ..data.text_rows import columns_of
from ..inference.adapted import device
from ..inference.sampling import check_conditions
from ..training.arguments import TrainingArguments
from ..training.denoiser import gap as denoiser_gap
from ..training.denoiser.batches import DenoiserBatches
from ..training.few_rows import only_few
from ..training.language import gap as text_gap
from ..training.language.losses import few_tokens

_SEED = 0  # as in training, unless told otherwise


def gap_of(data: InterventionalData, arguments: ComparedDataArguments) -> BaseGap:
    """How far the base that the arguments name is from the observational set; on the GPU if there is one.

    Raises:
        OSError, ValueError: for a base that cannot be read, or that the data does not fit.
        NotMeasuredError: where the two cannot be compared.
    """
    measure = _gap_of_texts if columns_of(data.content_column) else _gap_of_images
    return measure(data, arguments, torch.device(device()))


def _gap_of_images(data: InterventionalData, arguments: ComparedDataArguments, device: torch.device) -> BaseGap:
    name = cast(str, arguments.pretrained_model_name_or_path)
    base = load_base(name, revision=arguments.revision, variant=arguments.variant)
    check_conditions(base, None, 0 if base.takes_classes else None, None, arguments.resolution)
    denoiser_gap.check_measurable(base)
    base.pipe.to(device)
    settings = TrainingArguments(
        pretrained_model_name_or_path=name,
        output_dir="unused",
        class_column=arguments.class_column,
        resolution=arguments.resolution,
        instance_prompt=arguments.instance_prompt,
        num_frames=arguments.num_frames,
        seed=_SEED,
    )
    few = only_few(data, "", denoiser_gap.NUM_ROWS, _SEED)
    batches = DenoiserBatches(base, few, settings, 1, device)
    return denoiser_gap.denoiser_gap(base, batches.few("", denoiser_gap.NUM_ROWS), _SEED)


def _gap_of_texts(data: InterventionalData, arguments: ComparedDataArguments, device: torch.device) -> BaseGap:
    name = cast(str, arguments.pretrained_model_name_or_path)
    check_learned(data.content_column, arguments.completion_only_loss, arguments.assistant_only_loss)
    model = load_language_model(name, arguments.revision, torch.float32)
    model.to(cast(Any, device))
    tokenizer = load_tokenizer(name, arguments.revision)
    encoder_decoder = bool(model.config.is_encoder_decoder)
    tokenize = Tokenization(
        tokenizer,
        data.content_column,
        encoder_decoder=encoder_decoder,
        max_length=row_length(model, arguments.max_length),
        completion_only=arguments.completion_only_loss,
        assistant_only=arguments.assistant_only_loss,
    )
    decoder_inputs = cast(Any, model).prepare_decoder_input_ids_from_labels if encoder_decoder else None
    collate = Collation(0, device, decoder_inputs=decoder_inputs)
    if message := cut_rows(_tokens_by_context(data, tokenize), tokenize.max_length):
        print(message, flush=True)
    rows = few_tokens(data, "", text_gap.NUM_ROWS, tokenize, _SEED)
    return text_gap.text_gap(model, rows, collate, cast("int | None", tokenizer.eos_token_id), _SEED)


def _tokens_by_context(data: InterventionalData, tokenize: Tokenization) -> dict[str, list[TokenRow]]:
    """The tokens of all rows that are trained on, of a stream of the first ones."""
    numbers = data.counts or dict.fromkeys(data.contexts, STREAM_ROWS)
    return {context: few_tokens(data, context, numbers[context], tokenize, _SEED) for context in data.contexts}
