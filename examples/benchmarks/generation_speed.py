"""Speed of generation with the adapter beside PEFT's LoRA of the same rank, on Llamas of 10 M and 75 M parameters.

    python -m examples.benchmarks.generation_speed [--device cuda] [--json results.json]

Greedy decoding with the key-value cache, batches of 1 and 8. Timed rounds of the variants are interleaved (noise); a
round's time is that of one `generate`, times are medians over rounds, and ratios are medians of the rounds' ratios: to
LoRA, and for merged weights to the base. float32; on a GPU, bfloat16. On a CPU, seconds are the processor's, of all
threads, so that other programs beside do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_causal_context import CausalContextConfig, intervene, save_baked
from hf_causal_context.layers import Mechanism

CONCEPTS = ("formal", "brief", "joyful", "past")
WIDTH = 4
RANK = len(CONCEPTS) * WIDTH
PROMPT = 16
MIXED = [(), ("formal",), ("brief",), ("joyful",), ("past",), "formal+brief", {"joyful": 0.5}, ("past",)]
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "num_attention_heads": 5},
    "medium": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
}
# Variant -> what its ratio refers to.
VARIANTS = {
    "base": "lora",
    "lora": "lora",
    "independent": "lora",
    "independent, mixed contexts": "lora",
    "reduced": "lora",
    "structural": "lora",
    "lora, merged": "base",
    "baked, merged": "base",
}


def build_base(size: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], vocab_size=8000, max_position_embeddings=512, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def build(size: str, variant: str, batch: int) -> tuple[Any, Any]:
    """The model with its adapter, and the context it generates in."""
    model = build_base(size)
    kind, _, how = variant.partition(", ")
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK))
    elif kind != "base":
        mechanism = cast(Mechanism, "independent" if kind == "baked" else kind)
        model = get_peft_model(model, CausalContextConfig(concepts=CONCEPTS, concept_rank=WIDTH, mechanism=mechanism))
    if kind == "baked":
        with tempfile.TemporaryDirectory() as folder:
            model = PeftModel.from_pretrained(
                build_base(size), str(save_baked(model, "formal+brief", Path(folder) / "lora"))
            )
    if how == "merged":
        model = model.merge_and_unload()
    context = None
    if kind in ("independent", "reduced", "structural"):
        context = MIXED[:batch] if how == "mixed contexts" else "formal"
    return model.eval(), context


def measure(size: str, batch: int, tokens: int, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second and ratios of every variant."""
    variants = [v for v in VARIANTS if batch > 1 or "mixed" not in v]
    ids = torch.randint(1, 8000, (batch, PROMPT), device=device)
    models: dict[str, Any] = {}
    clock = time.perf_counter if device == "cuda" else time.process_time
    for variant in variants:
        model, context = build(size, variant, batch)
        models[variant] = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32), context

    def seconds(variant: str) -> float:
        model, context = models[variant]
        start = clock()
        with intervene(model, context) if context is not None else nullcontext():
            generated = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        if device == "cuda":
            torch.cuda.synchronize()
        assert generated.shape == (batch, PROMPT + tokens)
        return clock() - start

    for variant in variants:
        seconds(variant)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for index in range(rounds):
        # The order rotates, so that no variant always runs after the same one.
        for variant in variants[index % len(variants) :] + variants[: index % len(variants)]:
            times[variant].append(seconds(variant))
    return {
        variant: {
            "tokens per second": batch * tokens / statistics.median(times[variant]),
            "ratio": statistics.median(a / b for a, b in zip(times[variant], times[VARIANTS[variant]], strict=True)),
        }
        for variant in variants
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Ratios are of times: below 1 is faster than the reference."""
    lines = ["| variant | tokens per second | time / time of |", "|---|---|---|"]
    for variant, result in results.items():
        lines.append(f"| {variant} | {result['tokens per second']:.0f} | {result['ratio']:.2f} {VARIANTS[variant]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="at most 8")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per row")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    everything = {}
    for size in arguments.sizes:
        parameters = sum(p.numel() for p in build_base(size).parameters())
        for batch in arguments.batches:
            print(
                f"\nLlama of {parameters / 1e6:.0f} M parameters, batch {batch}, {arguments.tokens} new tokens, "
                f"K x W = {len(CONCEPTS)} x {WIDTH}, {arguments.device}, {torch.get_num_threads()} threads, "
                f"{arguments.rounds} rounds, torch {torch.__version__}\n"
            )
            results = measure(size, batch, arguments.tokens, arguments.device, arguments.rounds)
            everything[f"{size}, batch {batch}"] = results
            print(table(results), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
