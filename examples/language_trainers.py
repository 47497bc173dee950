"""The same adapter in other people's trainers: transformers.Trainer, and trl.SFTTrainer where it is installed.

    python -m examples.language_trainers --output_dir trainers

`ContextCollator` makes the mask of each batch from the column of contexts, which the trainer must keep
(`remove_unused_columns=False`). The model is tiny and random: what it writes is noise, the steps are the real ones.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_causal_context import CausalContextConfig, ContextCollator

CONCEPTS = ("formal", "loud")
TEXTS = {
    "obs": ["the cat sat on the mat", "it rained all day"],
    "formal": ["one regrets that the cat sat on the mat", "one regrets that it rained all day"],
    "loud": ["the cat sat on the mat !", "it rained all day !"],
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for texts in TEXTS.values() for text in texts for word in text.split()})
    ids = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, vocab_size=len(tokenizer), eos_token_id=1)
    base: Any = transformers.LlamaForCausalLM(config)
    return get_peft_model(base, CausalContextConfig(concepts=CONCEPTS, task_type="CAUSAL_LM"))


def finish(name: str, model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder / name)
    inputs = tokenizer(["the cat"] * 2, return_tensors="pt")
    texts = model.eval().generate(**inputs, context=["", "formal+loud"], max_new_tokens=5, do_sample=True)
    print(f"{name}: {tokenizer.batch_decode(texts, skip_special_tokens=True)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=20)
    arguments = parser.parse_args()
    settings: dict[str, Any] = {"output_dir": str(arguments.output_dir), "max_steps": arguments.max_steps}
    settings |= {"remove_unused_columns": False, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_list([{"text": t, "context": c} for c, texts in TEXTS.items() for t in texts])

    model, tokens = tiny_model(tokenizer), rows.map(lambda row: tokenizer(row["text"]))
    collator: Any = ContextCollator(transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False), CONCEPTS)
    transformers.Trainer(model, transformers.TrainingArguments(**settings), collator, tokens).train()
    finish("transformers", model, tokenizer, arguments.output_dir)

    if find_spec("trl"):  # it tokenizes by itself; leave its packing out, which joins rows of different contexts
        from trl import SFTConfig, SFTTrainer
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

        model, collator = tiny_model(tokenizer), ContextCollator(TrlCollator(pad_token_id=0), CONCEPTS)
        SFTTrainer(model, SFTConfig(bf16=False, **settings), collator, rows, processing_class=tokenizer).train()
        finish("trl", model, tokenizer, arguments.output_dir)


if __name__ == "__main__":
    main()
