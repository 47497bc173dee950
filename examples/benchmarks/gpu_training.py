"""A training step and a denoiser call beside PEFT's LoRA of the same rank, on a UNet of Stable Diffusion 1.5's size.

    python -m examples.benchmarks.gpu_training [--json results.json]
    python -m examples.benchmarks.gpu_training --device cpu --size tiny --batches 2 --rounds 2
    python -m examples.benchmarks.gpu_training --parts compiled_steps compiled_calls

The weights are random, so nothing is downloaded. A step is forward, backward and optimizer, under bfloat16 autocast
on a bfloat16 base with float32 adapter weights, as `hf-causal-context train --mixed_precision bf16` does it; a call
is all in bfloat16. Compiled are the repeated blocks, where all adapted layers are. Times are medians over rounds; the
peak is that of PyTorch's allocator during them. On a CPU everything is float32, and there is no peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model

from hf_causal_context import CausalContextConfig, intervene, save_baked
from hf_causal_context.layers import Mechanism

CONCEPTS = ("thick", "dark", "slant", "large")
WIDTH = 4
RANK = len(CONCEPTS) * WIDTH
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
MIXED = [(), ("thick",), ("dark",), ("slant",), ("large",), (), ("thick",), ("dark",)]
ADAPTERS = ("lora", "independent", "reduced", "structural")
# Variant of a call -> its reference.
CALLS = {
    "base": "lora",
    "lora": "lora",
    "independent, one context": "lora",
    "independent, mixed contexts": "lora",
    "reduced, mixed contexts": "lora",
    "structural, mixed contexts": "lora",
    "baked, merged": "base",
}
CALL_BATCH = 8
PARTS = ("steps", "calls", "compiled_steps", "compiled_calls")
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "tiny": {
        "sample_size": 16,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    },
}
Numbers = dict[str, float]


def build_base(size: str, device: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):  # 860 million random numbers take long on a CPU
        model = cast(Any, UNet2DConditionModel(**SIZES[size]))  # diffusers types its .to() wrongly
    return model.to(dtype=dtype_on(device)).eval().requires_grad_(False)


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def inputs(size: str, device: str, batch: int) -> dict[str, Any]:
    side, dtype = SIZES[size]["sample_size"], dtype_on(device)
    return {
        "sample": torch.randn(batch, 4, side, side, device=device, dtype=dtype),
        "timestep": torch.arange(batch, device=device) * 50,
        "encoder_hidden_states": torch.randn(batch, 77, SIZES[size]["cross_attention_dim"], device=device, dtype=dtype),
    }


def attach(base: Any, kind: str) -> Any:
    """Put a fresh adapter into the base, in place."""
    if kind == "lora":
        return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    config = CausalContextConfig(
        concepts=CONCEPTS, concept_rank=WIDTH, mechanism=cast(Mechanism, kind), target_modules=TARGETS
    )
    return get_peft_model(base, config)


def compile_blocks(base: Any, device: str) -> None:
    """Compile the repeated blocks; on a CPU without making code, which takes minutes."""
    base.compile_repeated_blocks(fullgraph=True, backend="inductor" if device == "cuda" else "eager")


def contexts(model: Any, kind: str, batch: int) -> AbstractContextManager[None]:
    """Another context for each row, of adapters that have contexts."""
    rows = [MIXED[i % len(MIXED)] for i in range(batch)]
    return nullcontext() if kind in ("base", "lora") else intervene(model, rows)


def measure(run: Callable[[], None], device: str, rounds: int) -> Numbers:
    """Median milliseconds and peak gigabytes of something that was run before."""
    gc.collect()  # earlier variants would count as memory of this one
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    return {"ms": statistics.median(times), "peak": peak}


def training_step(
    model: Any, kind: str, values: dict[str, Any], optimizer: torch.optim.Optimizer | None, device: str
) -> Callable[[], None]:
    """One step; without an optimizer forward alone, or with a gradient of the input (the least an adapter needs)."""
    batch = len(values["sample"])

    def run() -> None:
        autocast = torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()
        with contexts(model, kind, batch), autocast:
            loss = model(**values).sample.float().square().mean()
        if loss.requires_grad:
            loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        values["sample"].grad = None

    return run


def training_rows(size: str, device: str, batch: int, rounds: int, compiled: bool) -> dict[str, Numbers]:
    """Steps of every adapter; without compiling with both optimizers, and of the base."""
    base = build_base(size, device)
    values = inputs(size, device, batch)
    results: dict[str, Numbers] = {}
    if not compiled:
        results["base, forward alone"] = measure(training_step(base, "base", values, None, device), device, rounds)
        wanted = values | {"sample": values["sample"].clone().requires_grad_()}
        results["base, gradient of the input"] = measure(
            training_step(base, "base", wanted, None, device), device, rounds
        )
    for kind in ADAPTERS:
        if compiled:
            torch._dynamo.reset()
            compile_blocks(base, device)
        model = attach(base, kind).train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, fused in (("fused AdamW", True),) if compiled else (("AdamW", None), ("fused AdamW", True)):
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused)
            step = training_step(model, kind, values, optimizer, device)
            start = time.perf_counter()
            step()
            first = time.perf_counter() - start
            results[f"{kind}, {name}"] = measure(step, device, rounds) | {"first": first}
        base = model.unload().eval()
        if compiled:  # what was compiled has the adapter's layers in it
            base = build_base(size, device)
    for name, result in results.items():
        optimizer_name = name.rpartition(", ")[2]
        reference = results[f"lora, {optimizer_name if optimizer_name.endswith('AdamW') else 'AdamW'}"]
        result |= {"ratio": result["ms"] / reference["ms"], "peak ratio": result["peak"] / reference["peak"]}
    return results


def call_model(size: str, variant: str, device: str) -> tuple[Any, AbstractContextManager[None]]:
    """The model of a variant of CALLS, and the context that it is called in."""
    kind, _, how = variant.partition(", ")
    model = build_base(size, device)
    if kind == "baked":
        with tempfile.TemporaryDirectory() as folder:
            save_baked(attach(model, "independent"), "thick+slant", Path(folder) / "lora")
            lora = PeftModel.from_pretrained(build_base(size, device), str(Path(folder) / "lora"))
        model = lora.merge_and_unload()
    elif kind != "base":
        model = attach(model, kind)
    model = model.to(device, dtype_on(device)).eval()
    if how == "one context":
        return model, intervene(model, "thick+slant")
    return model, contexts(model, kind if how == "mixed contexts" else "base", CALL_BATCH)


@torch.no_grad()
def call_rows(size: str, device: str, rounds: int, compiled: bool) -> dict[str, Numbers]:
    """Calls of every variant without gradients."""
    values = inputs(size, device, CALL_BATCH)
    results: dict[str, Numbers] = {}
    for variant in CALLS:
        model, context = call_model(size, variant, device)
        if compiled:
            torch._dynamo.reset()
            compile_blocks(model.get_base_model() if isinstance(model, PeftModel) else model, device)

        def call(model: Any = model) -> None:
            model(**values)

        with context:
            start = time.perf_counter()
            call()
            first = time.perf_counter() - start
            results[variant] = measure(call, device, rounds) | {"first": first}
    for variant, result in results.items():
        reference = results[CALLS[variant]]
        result |= {"ratio": result["ms"] / reference["ms"], "peak ratio": result["peak"] / reference["peak"]}
    return results


def table(results: dict[str, Numbers], references: dict[str, str] | None = None) -> str:
    """Ratios are of times and of peaks: below 1 is faster or smaller than the reference."""
    lines = ["| variant | ms | time / time of | peak GB | peak / peak of | first run s |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        reference = (references or {}).get(name, "lora")
        first = f"{result['first']:.1f}" if "first" in result else ""
        lines.append(
            f"| {name} | {result['ms']:.1f} | {result['ratio']:.2f} {reference} | {result['peak']:.2f} | "
            f"{result['peak ratio']:.2f} {reference} | {first} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="sd15", choices=SIZES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="of steps; compiled, the first")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the numbers here too, after each table")
    arguments = parser.parse_args()
    size, device, rounds = arguments.size, arguments.device, arguments.rounds
    parameters = sum(p.numel() for p in build_base(size, device).parameters())
    side = SIZES[size]["sample_size"]
    print(
        f"UNet of {parameters / 1e6:.0f} M parameters, latents of {side} x {side}, K x W = {len(CONCEPTS)} x {WIDTH}, "
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, {rounds} rounds, torch {torch.__version__}"
    )
    everything: dict[str, dict[str, Numbers]] = {}

    def report(title: str, results: dict[str, Numbers], references: dict[str, str] | None = None) -> None:
        print(f"\n### {title}\n\n{table(results, references)}", flush=True)
        everything[title] = results
        if arguments.json:
            unfinished = arguments.json.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(everything, indent=2))
            unfinished.replace(arguments.json)

    for part in arguments.parts:
        compiled = part.startswith("compiled")
        how = "compiled" if compiled else "eager"
        if part.endswith("calls"):
            report(f"Denoiser call, batch {CALL_BATCH}, {how}", call_rows(size, device, rounds, compiled), CALLS)
        else:
            for batch in arguments.batches[:1] if compiled else arguments.batches:
                report(f"Training step, batch {batch}, {how}", training_rows(size, device, batch, rounds, compiled))


if __name__ == "__main__":
    main()
