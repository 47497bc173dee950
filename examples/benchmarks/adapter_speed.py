"""Speed, memory and size of the adapter beside PEFT's LoRA of the same rank, on a DiT and a UNet of 30-40 M parameters.

    python -m examples.benchmarks.adapter_speed [--device cuda] [--json results.json]

Every variant runs in a process of its own (peak memory), its timed rounds interleaved with the others' (noise); times
are medians over rounds, and ratios are medians of the rounds' ratios to LoRA. float32; on a GPU, bfloat16. On a CPU,
seconds are the processor's, of all threads, so that other programs beside do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from .interleaving import interleaved, median_ratio, peak_memory

CONCEPTS = ("thick", "dark", "slant", "large")
WIDTH = 4
BATCH = 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CONTEXTS = [(), ("thick",), ("dark",), ("slant",), ("large",), (), ("thick",), ("dark",)]
VARIANTS = [
    "base",
    "lora",
    "independent",
    "reduced",
    "structural",
    "independent, uniform",
    "lora, merged",
    "baked, merged",
]


def build_base(name: str) -> tuple[Any, dict[str, Any]]:
    import torch
    from diffusers.models import DiTTransformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    if name == "dit":
        model = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, in_channels=4, num_layers=12, sample_size=32, patch_size=2,
            num_embeds_ada_norm=1000,
        )  # fmt: skip
        labels = torch.arange(BATCH)
        inputs = {"hidden_states": torch.randn(BATCH, 4, 32, 32), "timestep": labels * 100, "class_labels": labels}
    else:
        model = UNet2DConditionModel(
            sample_size=32, block_out_channels=(96, 192, 384), layers_per_block=1, cross_attention_dim=256,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        inputs = {
            "sample": torch.randn(BATCH, 4, 32, 32),
            "timestep": torch.arange(BATCH) * 100,
            "encoder_hidden_states": torch.randn(BATCH, 77, 256),
        }
    return model.eval().requires_grad_(False), inputs


def build(base: str, variant: str, device: str) -> tuple[Any, dict[str, Any], Any]:
    """The model with its adapter, its inputs, and the context it runs under."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from hf_causal_context import CausalContextConfig, intervene, save_baked
    from hf_causal_context.layers import Mechanism

    model, inputs = build_base(base)
    rank = len(CONCEPTS) * WIDTH
    kind, _, how = variant.partition(", ")
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    elif kind != "base":
        mechanism = "independent" if kind == "baked" else kind
        config = CausalContextConfig(
            concepts=CONCEPTS, concept_rank=WIDTH, mechanism=cast(Mechanism, mechanism), target_modules=TARGETS
        )
        model = get_peft_model(model, config)
    if kind == "baked":
        with tempfile.TemporaryDirectory() as folder:
            save_baked(model, "thick+slant", Path(folder) / "lora")
            model = PeftModel.from_pretrained(build_base(base)[0], Path(folder) / "lora")
    if how == "merged":
        model = model.merge_and_unload()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model.to(device, dtype)
    inputs = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    context: Any = nullcontext()
    if kind in ("independent", "reduced", "structural"):
        context = intervene(model, "thick" if how == "uniform" else CONTEXTS)
    return model, inputs, context


def worker(base: str, variant: str, device: str, threads: int, pipe: Any) -> None:
    """Build one variant, then time one forward or one training step whenever asked."""
    import torch

    torch.set_num_threads(threads)
    model, inputs, context = build(base, variant, device)
    trains = any(p.requires_grad for p in model.parameters()) and "merged" not in variant

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    def step() -> None:
        model(**inputs).sample.float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    work: dict[str, Callable[[], None]] = {"forward": forward} | ({"step": step} if trains else {})
    clock = time.perf_counter if device == "cuda" else time.process_time
    with context:
        for run in work.values():
            run()
        pipe.send(list(work))
        while (name := pipe.recv()) != "stop":
            start = clock()
            work[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            pipe.send(clock() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()
    adapter_bytes, load = 0, 0.0
    if hasattr(model, "save_pretrained") and hasattr(model, "peft_config"):
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            adapter_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size
            fresh = build_base(base)[0]
            start = time.perf_counter()
            PeftModel.from_pretrained(fresh, folder)
            load = time.perf_counter() - start
    pipe.send({"peak": peak, "adapter_bytes": adapter_bytes, "load": load})


def measure(base: str, device: str, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Seconds, bytes and ratios of every variant on one base."""
    seconds, results = interleaved(worker, {v: (base, v, device, threads) for v in VARIANTS}, rounds)
    for variant, result in results.items():
        for name, values in seconds[variant].items():
            result[name] = statistics.median(values)
            reference = "lora, merged" if "merged" in variant else "lora"
            result[f"{name} / lora"] = median_ratio(values, seconds[reference][name])
        result["peak / lora"] = result["peak"] / results["lora"]["peak"]
    results["independent"]["step, mixed / uniform"] = median_ratio(
        seconds["independent"]["step"], seconds["independent, uniform"]["step"]
    )
    return results


def import_ratio(rounds: int) -> float:
    """Time of `import hf_causal_context` over `import peft`, each in a fresh interpreter."""

    def seconds(module: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start

    seconds("peft")
    return statistics.median(seconds("hf_causal_context") / seconds("peft") for _ in range(rounds))


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "| variant | forward ms (ratio) | forward + backward ms (ratio) | peak memory MB (ratio) | file kB | load ms |",
        "|---|---|---|---|---|---|",
    ]
    for variant, r in results.items():
        step = f"{1e3 * r['step']:.0f} ({r['step / lora']:.2f})" if "step" in r else ""
        size = f"{r['adapter_bytes'] / 1e3:.0f} | {1e3 * r['load']:.0f}" if r["adapter_bytes"] else " | "
        lines.append(
            f"| {variant} | {1e3 * r['forward']:.0f} ({r['forward / lora']:.2f}) | {step} | "
            f"{r['peak'] / 1e6:.0f} ({r['peak / lora']:.2f}) | {size} |"
        )
    lines.append(
        f"\nStep of a mixed-context batch over a uniform one: {results['independent']['step, mixed / uniform']:.2f}"
    )
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bases", nargs="+", default=["dit", "unet"], choices=("dit", "unet"))
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    everything = {}
    for base in arguments.bases:
        parameters = sum(p.numel() for p in build_base(base)[0].parameters())
        print(
            f"\n{base}: {parameters / 1e6:.1f} M parameters, batch {BATCH}, K x W = {len(CONCEPTS)} x {WIDTH}, "
            f"{arguments.device}, {arguments.threads} threads, "
            f"{arguments.rounds} rounds, torch {torch.__version__}\n"
        )
        everything[base] = measure(base, arguments.device, arguments.rounds, arguments.threads)
        print(table(everything[base]), flush=True)
    everything["import"] = import_ratio(5)
    print(f"\nimport hf_causal_context / import peft: {everything['import']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
