"""What grows with the number of concepts, of rows and of adapters: tables in Markdown and a plot.

    python -m examples.benchmarks.scaling [--output_dir scaling] [--rounds 7] [--parts concepts adapters rows] [--quick]

Concepts: a training step (forward, backward, AdamW) and a forward pass on a DiT, with adapters of K concepts of a fixed
total rank and of a fixed width, beside PEFT's LoRA of the same rank. Rows: balanced batches of small rows, read by
number and as a stream, and how long a resumed run waits for its first batch. Adapters: many on one model, of which one
or all are active. Variants take turns within every round; times are medians over rounds, ratios medians of the rounds'
ratios to LoRA. CPU, float32; of steps, processor time, so that other programs beside do not count. Memory is anonymous
memory, so without the pages of mapped files (Linux).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from diffusers.models import DiTTransformer2DModel
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from hf_causal_context import CausalContextConfig, intervene
from hf_causal_context.data import ContextSampler, InterventionalData, from_dataset, stream_batches
from hf_causal_context.layers import Mechanism

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BATCH = 8
TOTAL_RANK = 64
WIDTH = 4
FLAT = "structural, flat graph"  # the first concept acts on all others, so that no path is longer than one edge
VARIANTS = ("lora", "independent", "reduced", "structural", FLAT)
PARTS = ("concepts", "adapters", "rows")
ROW_CONTEXTS = ("obs", "a", "b", "c")
ROW_BATCH = 64


@dataclass(frozen=True)
class Sizes:
    """How far each table goes."""

    concepts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    rows: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    batches: int = 50  # read in one round
    adapters: tuple[int, ...] = (1, 2, 4, 8, 16)
    layers: int = 2
    heads: int = 4


QUICK = Sizes(concepts=(2, 4), rows=(1_000, 2_000), batches=4, adapters=(1, 2), layers=1, heads=1)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and as a multiple of LoRA's."""

    milliseconds: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.milliseconds:.1f} ({self.ratio:.2f})"


Timings = dict[str, dict[str, Timing]]  # variant -> "forward" or "step" -> its timing


def build_base(sizes: Sizes) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=sizes.heads, attention_head_dim=64, in_channels=4, num_layers=sizes.layers, sample_size=16,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    labels = torch.arange(BATCH)
    inputs = {"hidden_states": torch.randn(BATCH, 4, 16, 16), "timestep": labels * 100, "class_labels": labels}
    return model.eval().requires_grad_(False), inputs


def adapter_config(variant: str, names: Sequence[str], width: int) -> LoraConfig | CausalContextConfig:
    rank = len(names) * width
    if variant == "lora":
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    mechanism, _, flat = variant.partition(", ")
    graph = tuple((names[0], name) for name in names[1:]) if flat else None
    return CausalContextConfig(
        concepts=tuple(names),
        concept_rank=width,
        mechanism=cast(Mechanism, mechanism),
        concept_graph=graph,
        target_modules=TARGETS,
    )


def calls(model: Any, inputs: dict[str, Any], contexts: Any) -> dict[str, Callable[[], None]]:
    """One forward pass and one training step, each sample of the batch in a context of its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def run() -> torch.Tensor:
        if contexts is None:
            return model(**inputs).sample
        with intervene(model, contexts):
            return model(**inputs).sample

    def forward() -> None:
        with torch.no_grad():
            run()

    def step() -> None:
        run().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "step": step}


def measure(work: dict[str, dict[str, Callable[[], None]]], rounds: int) -> Timings:
    """Every call once to warm up, then `rounds` times, the variants in rotating order."""
    seconds: dict[str, dict[str, list[float]]] = {v: {name: [] for name in work[v]} for v in work}
    for run in (run for of_variant in work.values() for run in of_variant.values()):
        run()
    variants = list(work)
    for turn in range(rounds):
        first = turn % len(variants)
        for variant in variants[first:] + variants[:first]:
            for name, run in work[variant].items():
                start = time.process_time()
                run()
                seconds[variant][name].append(time.process_time() - start)
    return {
        variant: {
            name: Timing(
                1e3 * statistics.median(values),
                statistics.median(a / b for a, b in zip(values, seconds["lora"][name], strict=True)),
            )
            for name, values in of_variant.items()
        }
        for variant, of_variant in seconds.items()
    }


def scale_concepts(sizes: Sizes, rounds: int, width_of: Callable[[int], int]) -> dict[int, Timings]:
    """Timings for each number of concepts, given the width of each concept."""
    base, inputs = build_base(sizes)
    results = {}
    for count in sizes.concepts:
        names = [f"c{k}" for k in range(count)]
        contexts = [(), *((name,) for name in itertools.islice(itertools.cycle(names), BATCH - 1))]
        work = {}
        for variant in VARIANTS:
            model = get_peft_model(copy.deepcopy(base), adapter_config(variant, names, width_of(count))).train()
            work[variant] = calls(model, inputs, None if variant == "lora" else contexts)
        results[count] = measure(work, rounds)
    return results


def scale_adapters(sizes: Sizes, rounds: int, all_active: bool) -> dict[int, Timings]:
    """Timings for each number of adapters on one model, each of four concepts of width four."""
    base, inputs = build_base(sizes)
    results = {}
    for count in sizes.adapters:
        work = {}
        for variant in ("lora", "independent", "reduced", "structural"):
            concepts = [[f"a{n}c{k}" for k in range(4)] for n in range(count)]
            model: Any = copy.deepcopy(base)
            adapters = [f"adapter{n}" for n in range(count)]
            model = get_peft_model(model, adapter_config(variant, concepts[0], WIDTH), adapter_name=adapters[0])
            for name, names in zip(adapters[1:], concepts[1:], strict=True):
                model.add_adapter(name, adapter_config(variant, names, WIDTH))
            model.base_model.set_adapter(adapters if all_active else adapters[0])
            targets = concepts if all_active else concepts[:1]
            contexts = [tuple(names[sample % 4] for names in targets) for sample in range(BATCH)]
            work[variant] = calls(model.train(), inputs, None if variant == "lora" else contexts)
        results[count] = measure(work, rounds)
    return results


def write_rows(folder: str, count: int) -> None:
    rng = np.random.default_rng(0)
    contexts = np.array(ROW_CONTEXTS, dtype=object)[rng.integers(len(ROW_CONTEXTS), size=count)]
    pixels = [bytes(row) for row in rng.integers(256, size=(count, 64), dtype=np.uint8)]
    Dataset.from_dict({"image": pixels, "context": contexts.tolist()}).save_to_disk(folder)


def row_batches(data: InterventionalData, start: int) -> Iterator[Any]:
    if data.streaming:
        return stream_batches(data, ROW_BATCH, 0, start=start)
    rows: Any = data.rows
    sampler = ContextSampler(rows["context"], ROW_BATCH, 0, num_batches=2**40, start=start)
    return iter(DataLoader(rows, batch_sampler=sampler, collate_fn=list))


def anonymous_megabytes() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def read_rows(folder: str, count: int, streaming: bool, batches: int, rounds: int) -> dict[str, float]:
    """Runs in a process of its own, so that memory is that of this reader alone."""
    torch.set_num_threads(1)
    saved = cast(Dataset, load_from_disk(folder))
    before = anonymous_megabytes()
    start = time.perf_counter()
    data = from_dataset(saved.to_iterable_dataset() if streaming else saved, concepts=list(ROW_CONTEXTS[1:]))
    iterator = row_batches(data, 0)
    next(iterator)
    result = {"first batch s": time.perf_counter() - start}
    rates, memory = [], 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        rates.append(batches * ROW_BATCH / (time.perf_counter() - start))
        memory = max(memory, anonymous_megabytes() - before)
    start = time.perf_counter()
    next(row_batches(data, count // ROW_BATCH))
    result["resume s"] = time.perf_counter() - start
    return result | {"rows/s": statistics.median(rates), "memory MB": memory}


def scale_rows(sizes: Sizes, rounds: int) -> dict[int, dict[str, dict[str, float]]]:
    """For each number of rows, what reading by number and as a stream costs."""
    results: dict[int, dict[str, dict[str, float]]] = {}
    # A fork of a process that has only imported: no threads, and no memory of earlier readers.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["diffusers.models", "matplotlib.figure", "hf_causal_context.data"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for count in sizes.rows:
            with tempfile.TemporaryDirectory() as folder:
                write_rows(folder, count)
                results[count] = {
                    how: pool.apply(read_rows, (folder, count, how == "stream", sizes.batches, rounds))
                    for how in ("by number", "stream")
                }
    return results


def timing_table(title: str, results: dict[int, Timings], first: str) -> str:
    variants = list(next(iter(results.values())))
    lines = [f"{title}; ms (ratio to LoRA):", ""]
    for name in ("step", "forward"):
        lines += [f"| {first}, {name} | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
        for count, timings in results.items():
            lines.append(f"| {count} | " + " | ".join(str(timings[variant][name]) for variant in variants) + " |")
        lines.append("")
    return "\n".join(lines)


def row_table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    lines = [
        f"Rows of 64 bytes in {len(ROW_CONTEXTS)} contexts, batches of {ROW_BATCH}, one process:\n",
        "| rows | read | first batch s | rows/s | memory MB | first batch when resumed after one pass s |",
        "|---|---|---|---|---|---|",
    ]
    for count, readers in results.items():
        for how, r in readers.items():
            lines.append(
                f"| {count:,} | {how} | {r['first batch s']:.2f} | {r['rows/s']:,.0f} | {r['memory MB']:.0f} | "
                f"{r['resume s']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def plot(path: Path, timings: dict[str, dict[int, Timings]], rows: dict[int, dict[str, dict[str, float]]]) -> None:
    panels = len(timings) + 2 * bool(rows)
    figure = Figure(figsize=(4.5 * panels, 3.8), layout="constrained")
    axes = iter(np.atleast_1d(figure.subplots(1, panels)))
    for title, results in timings.items():
        axis = next(axes)
        for variant in list(next(iter(results.values())))[1:]:
            axis.plot(list(results), [t[variant]["step"].ratio for t in results.values()], "o-", label=variant)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(title=title, ylabel="training step / LoRA's")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize="small")
    for name in ("rows/s", "resume s") if rows else ():
        axis = next(axes)
        for how in ("by number", "stream"):
            axis.loglog(list(rows), [readers[how][name] for readers in rows.values()], "o-", label=how)
        axis.set(title=name, xlabel="rows")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("scaling"), help="for scaling.md and scaling.png")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = QUICK if arguments.quick else Sizes()
    rounds = arguments.rounds
    texts: list[str] = []

    def show(text: str) -> None:
        print(text, flush=True)
        texts.append(text)

    parameters = sum(p.numel() for p in build_base(sizes)[0].parameters())
    show(
        f"DiT of {parameters / 1e6:.1f} M parameters, batch {BATCH} in mixed contexts, {arguments.threads} threads, "
        f"{rounds} rounds, torch {torch.__version__}\n"
    )
    timings: dict[str, dict[int, Timings]] = {}
    if "concepts" in arguments.parts:
        for title, width_of in (
            (f"K concepts, total rank {TOTAL_RANK}", lambda count: TOTAL_RANK // count),
            (f"K concepts, width {WIDTH} each", lambda count: WIDTH),
        ):
            timings[title] = scale_concepts(sizes, rounds, width_of)
            show(timing_table(title, timings[title], "K"))
    if "adapters" in arguments.parts:
        for title, all_active in (("Adapters loaded, one active", False), ("Adapters loaded, all active", True)):
            timings[title] = scale_adapters(sizes, rounds, all_active)
            show(timing_table(title, timings[title], "adapters"))
    rows = scale_rows(sizes, rounds) if "rows" in arguments.parts else {}
    if rows:
        show(row_table(rows))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "scaling.md").write_text("\n".join(texts))
    plot(arguments.output_dir / "scaling.png", timings, rows)
    print(f"Written: {arguments.output_dir / 'scaling.md'} and scaling.png")


if __name__ == "__main__":
    main()
