"""The methods that `smollm2.py` trains: on single interventions, but for the oracle.

What is trained is kept in a folder, so that it is trained once; methods that train nothing are in `smollm2_peers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
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
from .chats import PROMPT, World
from .methods import OBSERVATIONAL_LORA, less_observational, lora_sum, stacked

ROWS = 2  # of every set in a step, on average
MAX_LENGTH = 56
_WEIGHTS = "adapter_model.safetensors"

Prompt = list[dict[str, str]]


@dataclass(frozen=True)
class Method:
    """A model, how it is put under a context, and what its reviews answer."""

    model: Any
    under: Callable[[Context], AbstractContextManager[Any]]
    prompt: Callable[[Context], Prompt] = lambda context: PROMPT


@dataclass(frozen=True)
class Study:
    """What all methods share."""

    base: Path
    folder: Path  # of what is trained
    sentences: Sequence[Sentence]
    world: World
    steps: int
    learning_rate: float
    rank: int
    mixed_precision: str
    seed: int

    @property
    def contexts(self) -> tuple[Context, ...]:
        """Those of the training sets."""
        return (Context(), *self.world.singles)

    @property
    def warmup(self) -> int:
        """Steps in which the rate rises; then it falls as a cosine does."""
        return self.steps // 20

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def loras(self) -> Any:
        """One model for all methods that combine LoRAs."""
        return _single_loras(self)

    def load_base(self) -> Any:
        """A fresh copy of the base; everything drawn from now on follows the seed."""
        set_seed(self.seed)
        return AutoModelForCausalLM.from_pretrained(self.base)

    def tokens(
        self,
        sentences: Sequence[Sentence],
        context: Context,
        prompt: Prompt = PROMPT,
        max_length: int = MAX_LENGTH,
    ) -> list[TokenRow]:
        """The sentences as reviews of a context; as the package has it, only the completions are learned.

        A longer prompt than the others' takes no room from the reviews.
        """
        room = max_length + len(self.beginning(prompt)) - len(self.beginning())
        tokenize = Tokenization(self.tokenizer, "prompt", max_length=room)
        return [tokenize(chat) for chat in self.world.chats(sentences, context, prompt)]

    def beginning(self, prompt: Prompt = PROMPT) -> list[int]:
        """What a review is written after."""
        return Tokenization(self.tokenizer, "prompt", max_length=MAX_LENGTH).beginning(prompt)


def base(study: Study) -> Method:
    """The frozen base: what happens by chance."""
    return Method(study.load_base().eval(), lambda context: nullcontext())


def adapter(study: Study) -> Method:
    """Ours: one adapter for all concepts, by the package's own trainer."""
    return _adapter(study, "adapter", study.contexts)


def adapter_without_part(study: Study) -> Method:
    """The same without the observational part: each concept also learns how the data differ from the base."""
    return _adapter(study, "adapter-without-part", study.contexts, observational_rank=0)


def self_composed(study: Study) -> Method:
    """The default, which from two fifths of its steps on also learns texts of pairs that it writes itself."""
    return _adapter(study, "adapter-self-composed", study.contexts, self_composed=study.world.pairs)


def oracle(study: Study) -> Method:
    """Ours, trained with the pairs too, as many rows of every set."""
    return _adapter(study, "oracle", (*study.contexts, *study.world.pairs))


def stacked_loras(study: Study) -> Method:
    """A combination adds up the LoRAs of its concepts."""
    return Method(study.loras, lambda context: lora_sum(study.loras, stacked(context)))


def subtracted_loras(study: Study) -> Method:
    """A combination also subtracts the LoRA of the observational set, but for one time."""
    return Method(study.loras, lambda context: lora_sum(study.loras, less_observational(context)))


def asked_lora(study: Study) -> Method:
    """One LoRA of all sets, as wide as all concepts, that is asked for each in words; a pair is asked for both."""
    folder = study.folder / "asked-LoRA"
    if (folder / _WEIGHTS).exists():
        model = PeftModel.from_pretrained(study.load_base(), folder)
    else:
        model = get_peft_model(study.load_base(), _lora_config(study.rank * len(study.contexts)))
        rows = [
            row
            for context in study.contexts
            for row in study.tokens(study.sentences, context, study.world.asking(context))
        ]
        _fit(study, model, rows, ROWS * len(study.contexts))
        model.save_pretrained(str(folder))
    return Method(model.eval(), lambda context: nullcontext(), study.world.asking)


def _adapter(
    study: Study,
    name: str,
    contexts: Iterable[Context],
    observational_rank: int | None = None,
    self_composed: Sequence[Context] = (),
) -> Method:
    contexts = tuple(contexts)
    folder = study.folder / name
    model = study.load_base()
    if (folder / _WEIGHTS).exists():
        model = PeftModel.from_pretrained(model, folder)
    else:
        part = observational_rank != 0
        columns: dict[str, list[Any]] = {"prompt": [], "completion": [], "context": []}
        for context in contexts:
            for chat in study.world.chats(study.sentences, context):
                columns["prompt"].append(chat["prompt"])
                columns["completion"].append(chat["completion"])
                columns["context"].append(str(context))
        data = texts_from_dataset(Dataset.from_dict(columns), concepts=study.world.concepts)
        arguments = TextArguments(
            pretrained_model_name_or_path=str(study.base),
            output_dir=str(folder),
            target_modules=TARGETS,
            concept_rank=study.rank,
            observational_rank=observational_rank,
            train_batch_size=ROWS * (len(contexts) + len(self_composed) - (not part)),
            context_weights=[] if part else ["obs=0"],  # without it the adapter is the base there: nothing to learn
            max_length=MAX_LENGTH,
            self_composed_contexts=[str(context) for context in self_composed],
            max_train_steps=study.steps,
            learning_rate=study.learning_rate,
            lr_scheduler="cosine",
            lr_warmup_steps=study.warmup,
            mixed_precision=study.mixed_precision,
            num_validation_texts=0,
            resume_from_checkpoint="latest",  # so that the same command goes on after an interruption
            seed=study.seed,
        )
        train_text(arguments, model, study.tokenizer, data)
    return Method(model.eval(), lambda context: intervene(model, context))


def _single_loras(study: Study) -> Any:
    """One LoRA per set, also of the observational one."""
    folder = study.folder / "LoRAs"
    model: Any = None
    for context in study.contexts:
        name = str(context) or OBSERVATIONAL_LORA
        config = _lora_config(study.rank)
        if model is None:
            model = get_peft_model(study.load_base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        if (folder / name / _WEIGHTS).exists():
            model.load_adapter(folder / name, name)
        else:
            _fit(study, model, study.tokens(study.sentences, context), ROWS)
            model.save_pretrained(folder, selected_adapters=[name])
    return model.eval()


def _lora_config(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")


def _fit(study: Study, model: Any, rows: Sequence[TokenRow], batch_size: int) -> None:
    table = {"input_ids": [row.ids.tolist() for row in rows], "labels": [row.labels.tolist() for row in rows]}
    with TemporaryDirectory() as folder:  # Trainer wants one
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=study.steps,
            per_device_train_batch_size=batch_size,
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
