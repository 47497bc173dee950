"""Language models: a causal or encoder-decoder model of transformers and interventional texts -> an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...bases.gap import BaseGap
from ...bases.language import check_language_model, load_language_model, load_tokenizer
from ...bases.names import resolve_base_name
from ...bases.packing import check_packing
from ...bases.token_batches import Collation, TextBatch, tokenize_all
from ...bases.tokens import Tokenization, TokenRow, check_learned, filler, prepare_tokenizer, row_length
from ...contexts import ConceptSet
from ...data import InterventionalData
from ...data.from_arguments import load_text_data
from ...data.reweighting import check_sets, without_rows
from ...errors import UserValueError
from ...hub.contents import CHAT_PROMPT, CardContents
from ...messages.wording import quoted
from ..arguments import TextArguments
from ..context_losses import ContextLosses
from ..loop.checkpoints import write_files
from ..loop.hooks import StepHooks
from ..loop.processes import make_accelerator
from ..publishing import train_and_publish
from ..recipe import DTYPES, FineTuning
from .batches import TextBatches
from .features import text_features, tokens_digest
from .gap import NUM_ROWS, text_gap
from .losses import few_tokens, perplexities, rows_to_measure
from .objective import LanguageModelingObjective
from .samples import sample_prompt, sample_texts, write_texts
from .self_composition import ComposedBatches, SelfComposition, self_composed_contexts


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
        ValueError, OSError: with `push_to_hub`, see `train_and_publish`.
    """
    accelerator = make_accelerator(arguments)
    # Made in there, so that it is gone, with its base, when a push loads the base once more.
    return train_and_publish(
        accelerator, arguments, lambda: LanguageFineTuning(accelerator, arguments, model, tokenizer, data).run()
    )


class LanguageFineTuning(FineTuning[TextArguments]):
    """Fine-tuning of a language model."""

    tokenize: Tokenization
    prompt: Sequence[int]  # of the samples
    rows: Sequence[TokenRow] | None  # of all rows, where they are no stream

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: TextArguments,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        data: InterventionalData | None,
    ) -> None:
        super().__init__(accelerator, arguments, data)
        self._base, self._tokenizer = model, tokenizer

    @property
    def base(self) -> PreTrainedModel:
        """The language model."""
        assert self._base is not None
        return self._base

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        assert self._tokenizer is not None
        return self._tokenizer

    def check_base(self) -> None:
        if self._base is None:
            check_language_model(self.arguments.pretrained_model_name_or_path, self.arguments.revision)

    def load_data(self) -> InterventionalData:
        return load_text_data(self.arguments)

    def check_names(self) -> None:
        super().check_names()
        self_composed_contexts(self.data, self.arguments)
        learned = (self.arguments.completion_only_loss, self.arguments.assistant_only_loss)
        check_learned(self.data.content_column, *learned)

    def load_base(self) -> nn.Module:
        arguments, data = self.arguments, self.data
        name, revision = arguments.pretrained_model_name_or_path, arguments.revision
        dtype = DTYPES[self.accelerator.mixed_precision]
        weights = {"quantization": arguments.quantization, "gguf_file": arguments.gguf_file}
        self._base = self._base or load_language_model(name, revision, dtype, **weights)
        self._tokenizer = self._tokenizer or load_tokenizer(name, revision)
        prepare_tokenizer(self.tokenizer, self.base, arguments.pad_token)
        self.tokenize = Tokenization(
            self.tokenizer,
            data.content_column,
            encoder_decoder=self.base.config.is_encoder_decoder,
            max_length=row_length(self.base, arguments.max_length),
            completion_only=arguments.completion_only_loss,
            assistant_only=arguments.assistant_only_loss,
        )
        self.prompt = sample_prompt(self.base, data, self.tokenize, arguments) if self.num_shown else []
        quiet = not self.accelerator.is_main_process
        self.rows = tokenize_all(data.rows, self.tokenize, quiet) if isinstance(data.rows, Dataset) else None
        seed = arguments.seed
        self._measured = rows_to_measure(data, self.tokenize, seed, self.rows) if self.validates else {}
        return self.base

    def token_indices(self) -> list[int] | None:
        vocabulary, tokens = self.tokenizer.get_vocab(), self.arguments.trainable_tokens
        if unknown := [token for token in tokens if token not in vocabulary]:
            raise UserValueError(
                f"--trainable_tokens: {quoted(unknown)} are not in the tokenizer's vocabulary. Add new tokens to the "
                "base first (tokenizer.add_tokens, model.resize_token_embeddings), and save both."
            )
        return [vocabulary[token] for token in tokens] or None

    @property
    def task_type(self) -> str:
        return "SEQ_2_SEQ_LM" if self.base.config.is_encoder_decoder else "CAUSAL_LM"

    def feature_extractor(self) -> tuple[Callable[[Dataset], Tensor], dict[str, Any]]:
        assert self.rows is not None  # the arguments refuse streams
        extract = partial(_features, self.model, self.rows, self._collation(), self.data.concepts)
        return extract, {"tokens": tokens_digest(self.rows)}

    def num_rows(self) -> int:
        return cast(int, self.batches.num_rows)

    def make_batches(self, num_batches: int) -> Callable[..., Iterator[TextBatch]]:
        if self._composition is None or self.arguments.dry_run:  # which writes nothing
            return self.batches
        self._composition.take_over()
        accumulation = self.arguments.gradient_accumulation_steps
        begins = [step * accumulation for step in self._composition.begins]
        return ComposedBatches(self.batches, begins, self._composition.rows)

    @property
    def hooks(self) -> StepHooks | None:
        return self._composition

    @property
    def own_rows(self) -> dict[str, int]:
        return self._composition.counts if self._composition is not None else {}

    def objective(self) -> LanguageModelingObjective:
        return LanguageModelingObjective(self.batches.tokens_per_row)

    def measure_gap(self) -> BaseGap:
        seed = self.arguments.seed
        few = few_tokens(self.data, "", NUM_ROWS, self.tokenize, seed, self.rows)
        end = cast("int | None", self.tokenizer.eos_token_id)
        return text_gap(self.base, few, self._collation(), end, seed)

    def losses(self) -> ContextLosses:
        collate, held_out = self._collation(self.arguments.packing), bool(self.data.held_out)
        return perplexities(
            self.accelerator, self.model, self._measured, self.data.concepts, collate, self.arguments, held_out
        )

    def enable_gradient_checkpointing(self) -> None:
        self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def make_ready(self) -> None:
        if self.arguments.packing:
            check_packing(self.base, self.arguments.train_batch_size)

    @property
    def num_shown(self) -> int:
        return self.arguments.num_validation_texts

    def show(self, step: int) -> None:
        arguments = self.arguments
        sample = partial(sample_texts, self.model, self.tokenize, self.prompt, arguments=arguments)
        texts = self.samples(step, sample)
        begin = cast(str, self.tokenizer.decode(list(self.prompt)))
        write_texts(self.accelerator, arguments.output_dir, begin, texts, self.labels(step), step)

    def write_beside(self, folder: Path) -> None:
        write_files(folder, "tokenizer_config.json", self.tokenizer.save_pretrained)

    def card_contents(self, folder: Path) -> CardContents:
        arguments = self.arguments
        return CardContents(
            name=folder.resolve().name,
            library="transformers",
            base=resolve_base_name(arguments.pretrained_model_name_or_path),
            pipeline_tag="text-generation",
            call={"do_sample": True, "max_new_tokens": arguments.max_new_tokens},
            inputs=_example_inputs(self.data, arguments.validation_prompt),
            auto_class=f"AutoPeftModelFor{'Seq2SeqLM' if self.base.config.is_encoder_decoder else 'CausalLM'}",
            revision=arguments.revision,
        )

    @cached_property
    def _composition(self) -> SelfComposition | None:
        if not (wanted := self_composed_contexts(self.data, self.arguments)):
            return None
        present = {*self.data.contexts, *self.data.reweighted}
        if not (contexts := without_rows(wanted, present, "written", self.accelerator.print)):
            return None
        assert self.rows is not None  # the arguments refuse streams
        model, arguments = self.model, self.arguments
        return SelfComposition(
            self.accelerator, model, contexts, self.data, self.rows, self.tokenize, arguments, self.begun_steps
        )

    @cached_property
    def batches(self) -> TextBatches:
        """What is trained on, in batches."""
        collate = self._collation(self.arguments.packing)
        return TextBatches(self.data, self.tokenize, collate, self.arguments, *self.process, self.rows)

    def _collation(self, packed: bool = False) -> Collation:
        encoder_decoder = self.base.config.is_encoder_decoder
        decoder_inputs = cast(Any, self.base).prepare_decoder_input_ids_from_labels if encoder_decoder else None
        return Collation(filler(self.tokenizer), self.accelerator.device, packed=packed, decoder_inputs=decoder_inputs)


def _features(
    model: PeftModel, tokens: Sequence[TokenRow], collate: Collation, concepts: ConceptSet, rows: Dataset
) -> Tensor:
    """Return what the base sees in rows with these tokens, (N, D)."""
    return text_features(model, tokens, collate, check_sets(rows["context"], concepts))


def _example_inputs(data: InterventionalData, prompt: str) -> str:
    """Python code for the card."""
    chat = not isinstance(next(iter(data.rows))[data.content_column], str)
    prompt = json.dumps(prompt or (CHAT_PROMPT if chat else "Once upon a time"), ensure_ascii=False)
    if not chat:
        return f'tokenizer({prompt}, return_tensors="pt")'
    messages = f'[{{"role": "user", "content": {prompt}}}]'
    options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
    return f"tokenizer.apply_chat_template({messages}, {options})"
