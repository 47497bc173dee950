"""Time and memory of a training step beside PEFT's LoRA, in transformers' Trainer on the same batches.

    python -m examples.benchmarks.text_training [--base FOLDER] [--json results.json]

The base is a Llama of 13 M random weights, or a language model in a folder. A step is Trainer's: forward, backward,
clipping, AdamW. Times are medians over rounds, and ratios are medians of the rounds' ratios to the LoRA of rank 16;
see `interleaving.py`. float32 on a CPU: seconds are the processor's, of all threads, so that other programs beside do
not count. Memory is what the process had at its peak, and by how much that is above the peak before the first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
    default_data_collator,
)

from hf_causal_context import CausalContextConfig, ContextCollator
from hf_causal_context.layers import Mechanism

from .interleaving import interleaved, median_ratio, peak_memory

CONCEPTS = ("formal", "brief", "joyful", "past")
WIDTH = 4
RANK = len(CONCEPTS) * WIDTH
PART = RANK  # the default's rank of the observational part
BATCH = 8
CONTEXTS = ("", *CONCEPTS, "", *CONCEPTS[:2])  # of the rows of a batch
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SMALL: dict[str, Any] = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "vocab_size": 8000,
}
# Variant -> the rank of a LoRA, or a mechanism and the rank of its observational part.
VARIANTS: dict[str, int | tuple[Mechanism, int]] = {
    f"LoRA, rank {RANK}": RANK,
    "independent, no part": ("independent", 0),
    "reduced, no part": ("reduced", 0),
    "structural, no part": ("structural", 0),
    f"LoRA, rank {RANK + PART}": RANK + PART,
    "independent": ("independent", PART),
    "reduced": ("reduced", PART),
    "structural": ("structural", PART),
}
REFERENCE = next(iter(VARIANTS))


def build(base: Path | None, variant: str) -> Any:
    """The base with the adapter of a variant."""
    torch.manual_seed(0)
    model: Any
    if base is None:
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    kind = VARIANTS[variant]
    if isinstance(kind, int):
        return get_peft_model(model, LoraConfig(r=kind, lora_alpha=kind, target_modules=TARGETS))
    mechanism, part = kind
    config = CausalContextConfig(
        concepts=CONCEPTS,
        concept_rank=WIDTH,
        mechanism=mechanism,
        observational_rank=part,
        target_modules=TARGETS,
    )
    return get_peft_model(model, config)


class _Timed(TrainerCallback):
    """Makes a step when asked for one, and says how long it took; the first is not timed."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self.pipe.send(time.process_time() - self.start if state.global_step > 1 else ["step"])
        control.should_training_stop = self.pipe.recv() == "stop"


def worker(base: Path | None, variant: str, tokens: int, threads: int, pipe: Any) -> None:
    """Train one variant, one step whenever asked."""
    torch.set_num_threads(threads)
    model = build(base, variant)
    ids = torch.randint(1, model.config.vocab_size, (BATCH, tokens)).tolist()
    lora = isinstance(VARIANTS[variant], int)
    rows: dict[str, Any] = {"input_ids": ids, "labels": ids} | ({} if lora else {"context": list(CONTEXTS)})
    before = peak_memory()
    with TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=1_000_000,
            per_device_train_batch_size=BATCH,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        collator = cast(Any, default_data_collator if lora else ContextCollator(default_data_collator, CONCEPTS))
        Trainer(model, settings, collator, Dataset.from_dict(rows), callbacks=[_Timed(pipe)]).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pipe.send({"peak": peak_memory(), "growth": peak_memory() - before, "trained": trained})


def measure(base: Path | None, tokens: int, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Seconds, bytes and ratios of every variant on one base."""
    seconds, results = interleaved(worker, {v: (base, v, tokens, threads) for v in VARIANTS}, rounds)
    for variant, result in results.items():
        result["step"] = statistics.median(seconds[variant]["step"])
        result["step / lora"] = median_ratio(seconds[variant]["step"], seconds[REFERENCE]["step"])
        for name in ("peak", "growth"):
            result[f"{name} / lora"] = result[name] / results[REFERENCE][name]
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "| variant | trained weights | step, ms (ratio) | peak memory, MB (ratio) | of it by training, MB (ratio) |",
        "|---|---|---|---|---|",
    ]
    for variant, r in results.items():
        lines.append(
            f"| {variant} | {r['trained']:,.0f} | {1e3 * r['step']:.0f} ({r['step / lora']:.2f}) "
            f"| {r['peak'] / 1e6:.0f} ({r['peak / lora']:.2f}) | {r['growth'] / 1e6:.0f} ({r['growth / lora']:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, help="a language model's folder")
    parser.add_argument("--tokens", type=int, default=56, help="of each row")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    print(
        f"{arguments.base or 'Llama of 13 M random weights'}, {BATCH} x {arguments.tokens} tokens, "
        f"K x W = {len(CONCEPTS)} x {WIDTH}, {arguments.threads} threads, {arguments.rounds} rounds, "
        f"torch {torch.__version__}\n"
    )
    results = measure(arguments.base, arguments.tokens, arguments.rounds, arguments.threads)
    print(table(results), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
