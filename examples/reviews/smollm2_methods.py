"""The methods that `smollm2.py` compares: how each is trained on single interventions, and how it makes pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_causal_context import Context, intervene
from hf_causal_context.bases.tokens import Tokenization, TokenRow
from hf_causal_context.data import texts_from_dataset
from hf_causal_context.training.arguments import TextArguments
from hf_causal_context.training.language import train_text

from ..worlds.reviews import Sentence
from .base import TARGETS
from .chats import CONCEPTS, PROMPT, chats
from .methods import OBSERVATIONAL_LORA, less_observational, lora_sum, stacked

ROWS = 2  # of every set in a step, on average
MAX_LENGTH = 56

Models = dict[str, tuple[Any, Callable[[Context], AbstractContextManager[Any]]]]  # name -> model, and how it intervenes


@dataclass(frozen=True)
class Study:
    """What all methods share."""

    base: Path
    sentences: Sequence[Sentence]
    contexts: tuple[Context, ...]  # of the training sets
    steps: int
    learning_rate: float
    rank: int
    mixed_precision: str
    seed: int

    @property
    def warmup(self) -> int:
        """Steps in which the rate rises; then it falls as a cosine does."""
        return self.steps // 20

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def tokenize(self) -> Tokenization:
        """The package's own: only the completions are learned."""
        return Tokenization(self.tokenizer, "prompt", max_length=MAX_LENGTH)

    def load_base(self) -> Any:
        """A fresh copy of the base; everything drawn from now on follows the seed."""
        set_seed(self.seed)
        return AutoModelForCausalLM.from_pretrained(self.base)

    def tokens(self, sentences: Sequence[Sentence], context: Context) -> list[TokenRow]:
        """The sentences as reviews of a context."""
        return [self.tokenize(chat) for chat in chats(sentences, context)]

    def prompt(self) -> list[int]:
        """What every review is written after."""
        return self.tokenize.beginning(PROMPT)


def base(study: Study) -> Models:
    """The frozen base: what happens by chance."""
    return {"base": (study.load_base().eval(), lambda context: nullcontext())}


def adapter(study: Study, name: str, observational_rank: int | None = None) -> Models:
    """Ours: one adapter for all concepts, by the package's own trainer."""
    part = observational_rank != 0
    columns: dict[str, list[Any]] = {"prompt": [], "completion": [], "context": []}
    for context in study.contexts:
        for chat in chats(study.sentences, context):
            columns["prompt"].append(chat["prompt"])
            columns["completion"].append(chat["completion"])
            columns["context"].append(str(context))
    data = texts_from_dataset(Dataset.from_dict(columns), concepts=CONCEPTS)
    model = study.load_base()
    with TemporaryDirectory() as folder:
        arguments = TextArguments(
            pretrained_model_name_or_path=str(study.base),
            output_dir=folder,
            target_modules=TARGETS,
            concept_rank=study.rank,
            observational_rank=observational_rank,
            train_batch_size=ROWS * (len(study.contexts) - (not part)),
            context_weights=[] if part else ["obs=0"],  # without it the adapter is the base there: nothing to learn
            max_length=MAX_LENGTH,
            max_train_steps=study.steps,
            learning_rate=study.learning_rate,
            lr_scheduler="cosine",
            lr_warmup_steps=study.warmup,
            mixed_precision=study.mixed_precision,
            num_validation_texts=0,
            seed=study.seed,
        )
        train_text(arguments, model, study.tokenizer, data)
    return {name: (model.eval(), lambda context: intervene(model, context))}


def loras(study: Study) -> Models:
    """One LoRA per set, also of the observational one, and two ways to make combinations of them."""
    model: Any = None
    config = LoraConfig(r=study.rank, lora_alpha=study.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    for context in study.contexts:
        name = str(context) or OBSERVATIONAL_LORA
        if model is None:
            model = get_peft_model(study.load_base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        _fit(study, model, study.tokens(study.sentences, context))
    return {
        "stacked LoRAs": (model, lambda context: lora_sum(model, stacked(context))),
        "a+b-obs": (model, lambda context: lora_sum(model, less_observational(context))),
    }


def _fit(study: Study, model: Any, rows: Sequence[TokenRow]) -> None:
    table = {"input_ids": [row.ids.tolist() for row in rows], "labels": [row.labels.tolist() for row in rows]}
    with TemporaryDirectory() as folder:  # Trainer wants one
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=study.steps,
            per_device_train_batch_size=ROWS,
            learning_rate=study.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=study.warmup,
            weight_decay=0.01,  # as in ours
            bf16=study.mixed_precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=study.seed,
        )
        Trainer(model, settings, DataCollatorForSeq2Seq(study.tokenizer), Dataset.from_dict(table)).train()
    model.eval()


# name of a training -> what trains it; one training of LoRAs gives two methods
METHODS: Mapping[str, Callable[[Study], Models]] = {
    "base": base,
    "LoRAs": loras,
    "adapter": partial(adapter, name="adapter"),
    "adapter, no observational part": partial(adapter, name="adapter, no observational part", observational_rank=0),
}
