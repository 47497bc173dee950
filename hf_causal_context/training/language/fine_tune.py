"""Language models: a causal or encoder-decoder model of transformers and interventional texts -> an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...bases.gap import BaseGap
from ...bases.language import check_language_model, load_language_model
from ...bases.names import lasting_name
from ...bases.token_batches import Collation, tokenise_all
from ...bases.tokens import Tokenisation, TokenRow, check_packing, prepare_tokenizer, row_length
from ...contexts import ConceptSet
from ...data import InterventionalData, check_data
from ...data.from_arguments import load_text_data
from ...data.reweighting import check_sets
from ...hub.card import write_card
from ...hub.contents import CardContents
from ..arguments import TextArguments
from ..data_record import record_data
from ..finetune import attach_adapter
from ..gap_report import record_gap, report_gap
from ..grids import validation_contexts
from ..loop.checkpoints import write_files
from ..loop.memory import memory_for_base
from ..loop.processes import main_process_first, make_accelerator
from ..loop.sharding import shard_base
from ..loop.trainer import fit
from ..observational import observational_samples, settle_observational_steps
from ..publishing import published
from ..reweighting import add_reweighted_contexts
from .batches import TextBatches
from .features import text_features, tokens_digest
from .gap import NUM_ROWS, text_gap
from .losses import few_tokens, perplexities, rows_to_measure
from .objective import LanguageModelingObjective
from .samples import sample_prompt, sample_texts, write_texts

_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train_text(
    arguments: TextArguments,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: InterventionalData | None = None,
) -> Path:
    """Fine-tune an adapter on a frozen language model and return the folder that holds it and the tokenizer.

    Args:
        arguments: the settings; `hf-causal-context train-text` makes them from its command line.
        model: a base that is loaded already, instead of the one that `arguments` name.
        tokenizer: its tokenizer; loaded from where `arguments` say by default.
        data: data that is loaded already, instead of what `arguments` name.

    Raises:
        ValueError: for data that cannot be trained on, or arguments that do not fit the base.
        TrainingDivergedError, TrainingMemoryError, TrainingInterrupted, CheckpointError, FileNotFoundError: see `fit`.
        ValueError, OSError: with `push_to_hub`, see `published`.
    """
    accelerator = make_accelerator(arguments)
    return published(accelerator, arguments, partial(_fine_tune, accelerator, arguments, model, tokenizer, data))


def _fine_tune(
    accelerator: Accelerator,
    arguments: TextArguments,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    data: InterventionalData | None,
) -> Path:
    if model is None:
        check_language_model(arguments.pretrained_model_name_or_path, arguments.revision)
    data = data if data is not None else load_text_data(arguments)
    if data.streaming and arguments.max_train_steps is None:
        raise ValueError("A stream has no known length, so it has no epochs. Give --max_train_steps.")
    if accelerator.is_main_process:
        report = check_data(data)
        print(report.table(), flush=True)
        report.raise_for_errors()
    if model is None:
        model = load_language_model(
            arguments.pretrained_model_name_or_path, arguments.revision, _DTYPES[accelerator.mixed_precision]
        )
    if tokenizer is None:
        tokenizer = cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(arguments.pretrained_model_name_or_path, revision=arguments.revision),
        )
    prepare_tokenizer(tokenizer, model, arguments.pad_token)
    encoder_decoder = bool(model.config.is_encoder_decoder)
    tokenise = Tokenisation(
        tokenizer,
        data.content_column,
        encoder_decoder=encoder_decoder,
        max_length=row_length(model, arguments.max_length),
        completion_only=arguments.completion_only_loss,
    )
    prompt = sample_prompt(model, data, tokenise, arguments) if arguments.num_validation_texts else []
    if not arguments.shard_base:  # else a device may be too small for it
        with memory_for_base(accelerator.device, arguments):
            model.to(cast(Any, accelerator.device))
    collation = partial(
        Collation,
        cast(int, tokenizer.pad_token_id),
        accelerator.device,
        decoder_inputs=cast(Any, model).prepare_decoder_input_ids_from_labels if encoder_decoder else None,
    )
    collate = collation(packed=arguments.packing)
    process = (accelerator.process_index, accelerator.num_processes)
    rows = tokenise_all(data.rows, tokenise, quiet=process[0] > 0) if isinstance(data.rows, Dataset) else None
    watched = data.held_out or arguments.num_validation_texts or arguments.validation_steps
    measured = rows_to_measure(data, tokenise, arguments.seed, rows) if watched else {}
    shown = validation_contexts(arguments, arguments.observational_name, data.concepts, data.held_out)
    set_seed(arguments.seed)  # the adapter's initial weights
    adapted = attach_adapter(model, data, arguments, task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM")
    if arguments.reweighted_contexts:
        assert rows is not None  # the arguments refuse streams
        with main_process_first(accelerator, Path(arguments.output_dir)):  # it estimates what the others read
            look = partial(_features, adapted, rows, collation(), data.concepts)
            made_from = {"tokens": tokens_digest(rows)}
            data = add_reweighted_contexts(data, arguments, accelerator, look, made_from)
    batches = TextBatches(data, tokenise, collate, arguments, *process, rows)
    num_steps = arguments.max_train_steps or arguments.num_train_epochs * arguments.steps_per_epoch(
        cast(int, batches.num_rows), accelerator.num_processes
    )
    arguments = settle_observational_steps(arguments, num_steps)
    with main_process_first(accelerator, Path(arguments.output_dir)):  # it measures, and the others wait
        gap = report_gap(accelerator, arguments, lambda: _gap(model, data, tokenise, collation(), arguments.seed, rows))
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if arguments.shard_base:
        with memory_for_base(accelerator.device, arguments):
            shard_base(adapted, accelerator.device)
    if arguments.packing:
        check_packing(model, arguments.train_batch_size)
    if arguments.compile:
        model.compile()

    losses = perplexities(accelerator, adapted, measured, data.concepts, collate, arguments, bool(data.held_out))

    def begin(first: int) -> dict[str, float]:
        losses.begin(first)
        return record_gap(gap, Path(arguments.output_dir))

    def validate(step: int) -> None:
        losses.tell(step)
        if prompt:
            texts = sample_texts(adapted, tokenise, prompt, shown, arguments)
            begin = cast(str, tokenizer.decode(prompt))
            write_texts(accelerator, arguments.output_dir, begin, texts, shown, arguments.observational_name, step)

    def finish(folder: Path) -> None:
        write_files(folder, "tokenizer_config.json", tokenizer.save_pretrained)
        record_data(data, folder)
        CardContents(
            name=folder.resolve().name,
            library="transformers",
            base=lasting_name(arguments.pretrained_model_name_or_path),
            pipeline_tag="text-generation",
            call={"do_sample": True, "max_new_tokens": arguments.max_new_tokens},
            inputs=_example_inputs(data, arguments.validation_prompt),
            auto_class=f"AutoPeftModelFor{'Seq2SeqLM' if encoder_decoder else 'CausalLM'}",
            revision=arguments.revision,
        ).save(folder)
        write_card(folder)

    objective = LanguageModelingObjective(batches.tokens_per_row)
    ordered = partial(batches, num_observational=observational_samples(arguments, accelerator.num_processes))
    return fit(accelerator, adapted, objective, ordered, arguments, num_steps, validate, finish=finish, begin=begin)


def _gap(
    model: PreTrainedModel,
    data: InterventionalData,
    tokenise: Tokenisation,
    collate: Collation,
    seed: int,
    rows: Sequence[TokenRow] | None,
) -> BaseGap:
    """How far the base is from the observational set."""
    few = few_tokens(data, "", NUM_ROWS, tokenise, seed, rows)
    return text_gap(model, few, collate, cast("int | None", tokenise.tokenizer.eos_token_id), seed)


def _features(
    model: PeftModel, tokens: Sequence[TokenRow], collate: Collation, concepts: ConceptSet, rows: Dataset
) -> Tensor:
    """What the base sees in rows with these tokens, (N, D)."""
    return text_features(model, tokens, collate, check_sets(rows["context"], concepts))


def _example_inputs(data: InterventionalData, prompt: str) -> str:
    """Python code for the card."""
    prompt = json.dumps(prompt or "Once upon a time", ensure_ascii=False)
    if isinstance(next(iter(data.rows))[data.content_column], str):
        return f'tokenizer({prompt}, return_tensors="pt")'
    messages = f'[{{"role": "user", "content": {prompt}}}]'
    options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
    return f"tokenizer.apply_chat_template({messages}, {options})"
