"""What the commands of this folder share: their arguments, and the loop over seeds and methods."""

import argparse
from pathlib import Path
from typing import Any

from .baselines import BASELINES
from .protocol import METHODS, World, floor, run, write
from .tables import table


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of every command."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--output_dir", type=Path, required=True)
    result.add_argument("--scale", choices=("small", "full"), default="full", help="small: minutes on a CPU")
    return result


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of every table."""
    result = plain_parser(description)
    result.add_argument("--seeds", type=int, nargs="+", help="by default 0 (small) or 0 to 4 (full)")
    result.add_argument("--methods", nargs="+", choices=METHODS, help="by default all")
    result.add_argument("--published", action="store_true", help="add the published variant of every context module")
    result.add_argument(
        "--hierarchical", action="store_true", help="a HierarchicalVAE in place of the lightweight VAE; no baselines"
    )
    return result


def run_table(arguments: argparse.Namespace, world: World, cited: str | None) -> None:
    """Train and measure what the arguments ask for, and write the table after every run."""
    small = arguments.scale == "small"
    seeds = arguments.seeds or ([0] if small else range(5))
    available = [name for name in METHODS if not (arguments.hierarchical and name in BASELINES)]
    chosen = set(arguments.methods or available)
    if refused := sorted(chosen.difference(available)):
        raise SystemExit(f"{refused} need an encoder and a decoder. Leave them or --hierarchical out.")
    if any(METHODS[method].get("mode") for method in chosen):
        chosen.add("base pooled")  # which they start from
    methods = [method for method in METHODS if method in chosen]
    if arguments.published:
        methods += [f"{method}, published" for method in methods if method.startswith("CM")]
    # With one context in a batch, as published: 8 batches of 64 instead of one of 512.
    published = {"published": True} | ({} if small else {"train_batch_size": 64, "gradient_accumulation_steps": 8})
    runs: dict[str, list[dict[str, Any]]] = {}
    floors = []
    architecture = {"architecture": "HierarchicalVAE"} if arguments.hierarchical else {}
    for seed in seeds:
        floors.append(floor(world, seed, arguments.output_dir))
        for method in methods:
            variant = architecture | (published if method.endswith(", published") else {})
            runs.setdefault(method, []).append(run(world, method, seed, arguments.output_dir, variant))
            text = table(world, cited, runs, floors)
            write(arguments.output_dir / "results.md", text)
            print(text)
