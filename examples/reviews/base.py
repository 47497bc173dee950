"""Pretrain the base of these examples: a small Llama on film reviews as they are written, with no intervention.

    python -m examples.reviews.base --data_dir movie_reviews --output_dir reviews-base

About five minutes on two CPU cores. `movie_reviews` holds rt-polarity.pos and rt-polarity.neg; without --data_dir the
same corpus is read from the Hub. With --gap the base is pretrained on other texts than those the adapters learn from,
as every real base was: on negative sentences only, signed in front ("variety : a film ." for "a film . -- variety").
"""

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_causal_context import Context
from hf_causal_context.training.arguments import TextArguments

from ..worlds.reviews import CONCEPTS, read_sentences, write_reviews

HELD_OUT_SENTENCES = 500  # the last ones; nothing here or in the other examples trains on them
PAD, BEGIN, END = "<pad>", "<s>", "</s>"

# What adapters of this base are trained with, ours and the peers'.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTH = 8  # rank of each concept, and of each LoRA
ROWS = 16  # of every set in a step, on average
LEARNING_RATE = 5e-3

SINGLES = [Context(name) for name in CONCEPTS]
PAIRS = [a | b for a, b in combinations(SINGLES, 2)]
CONTEXTS = [Context(), *SINGLES, *PAIRS]


def adapter_arguments(
    base: str, output_dir: str, max_steps: int, observational_rank: int | None = None, **changes: Any
) -> TextArguments:
    """The settings of our adapter, by default with an observational part."""
    part = observational_rank != 0
    return TextArguments(
        pretrained_model_name_or_path=base,
        output_dir=output_dir,
        target_modules=TARGETS,
        concept_rank=WIDTH,
        observational_rank=observational_rank,
        train_batch_size=ROWS * (len(SINGLES) + part),
        max_train_steps=max_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler="cosine",
        lr_warmup_steps=max_steps // 20,
        context_weights=[] if part else ["obs=0"],  # without it the adapter is the base there: nothing to learn
        **changes,
    )


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 2,048 tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=[PAD, BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END)


def signed_in_front(text: str) -> str:
    """A review in another layout, which the adapters' data never have."""
    body, critic = text.rsplit(" -- ", 1)
    return f"{critic} : {body}"


def pretrain(output_dir: Path, data_dir: Path | None, max_steps: int, gap: bool = False) -> None:
    """Write the base and its tokenizer to a folder."""
    set_seed(0)
    sentences = read_sentences(data_dir)[:-HELD_OUT_SENTENCES]
    texts, _ = write_reviews(sentences, 5 * len(sentences))  # every sentence five times, with concepts drawn anew
    tokenizer = build_tokenizer(texts)  # the same with and without the gap, so that perplexities can be compared
    if gap:
        negative = [sentence for sentence in sentences if not sentence.positive]
        texts = [signed_in_front(text) for text in write_reviews(negative, len(texts))[0]]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
    )
    settings = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=48,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, max_steps // 10),
        adam_beta2=0.98,
        weight_decay=0.1,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
    )
    rows = Dataset.from_dict({"input_ids": [tokenizer(text + END).input_ids for text in texts]})
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(LlamaForCausalLM(config), settings, collate, rows)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("reviews-base"))
    parser.add_argument("--max_steps", type=int, default=1200)
    parser.add_argument("--gap", action="store_true", help="pretrain on other texts than the adapters' data")
    parsed = parser.parse_args()
    pretrain(parsed.output_dir, parsed.data_dir, parsed.max_steps, parsed.gap)
