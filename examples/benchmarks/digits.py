"""Does it compose in images? The digits' adapter without and with reweighted pairs, and its oracle.

    python -m examples.benchmarks.digits --output_dir digits-benchmark

The oracle is the same adapter trained with the pairs. All are evaluated by `hf_causal_context.evaluation` beside real
images of glyphs that training never saw; each leaves its report in the folder, and is not made again if it is there.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from hf_causal_context.bases.loading import load_base
from hf_causal_context.data.worlds.digits import CONCEPTS, read_attributes
from hf_causal_context.evaluation.evaluator import evaluate
from hf_causal_context.evaluation.report import write_report
from hf_causal_context.quickstart import BASE, CONTEXTS, PAIRS, digit_data, training_arguments
from hf_causal_context.training.finetune import train

from .digit_peers import BENCHMARK, NUM_INFERENCE_STEPS

VARIANTS = {"singles only": [], "reweighted pairs": ["pairs"], "oracle": []}
COLUMNS = (
    *("adapter", "singles", "pairs", "floor", "base", "darkness+thickness"),
    *("conformity", "real", "the base's", "largest leak"),
)


def attributes(images: Tensor) -> Tensor:
    """Images (N, 1, 32, 32) in [0, 1] -> thickness, darkness, slant and size (N, 4)."""
    return torch.from_numpy(read_attributes((255 * images[:, 0]).round().byte().numpy())).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows_per_context", type=int, default=3000)
    parser.add_argument("--num_samples", type=int, default=96)
    parser.add_argument("--num_seeds", type=int, default=2, help="groups of samples")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    arguments = parser.parse_args()
    real = digit_data(1000, seed=90, contexts=CONTEXTS, training_contexts=CONTEXTS[:5], split="test")
    rows = []
    for name, reweighted in VARIANTS.items():
        folder = arguments.output_dir / f"{name.replace(' ', '-')}-{arguments.seed}"
        if not (folder / "report" / "report.json").exists():
            contexts = CONTEXTS if name == "oracle" else CONTEXTS[: -len(PAIRS)]
            data = digit_data(arguments.rows_per_context, arguments.seed, contexts=contexts, training_contexts=contexts)
            base = load_base(str(BASE))
            settings = training_arguments(folder, arguments.seed)
            train(dataclasses.replace(settings, **BENCHMARK, reweighted_contexts=reweighted), base, data)
            report = evaluate(
                base,
                real,
                num_samples=arguments.num_samples,
                num_seeds=arguments.num_seeds,
                num_inference_steps=NUM_INFERENCE_STEPS,
                batch_size=64,
                attributes=attributes,
                attribute_names=CONCEPTS,
            )
            write_report(report, folder / "report")
        rows.append((name, json.loads((folder / "report" / "report.json").read_text())))
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, report in rows:
        hard = next(c for c in report["contexts"] if c["context"] == "darkness+thickness")["distance"]["samples"]
        singles, pairs, leak = report["trained"], report["unseen"], report["leakage"]
        distances = (singles["samples"], pairs["samples"], pairs["floor"], pairs["base"], hard["mean"])
        cells = [f"{distance:.4f}" for distance in distances]
        cells += [f"{pairs[f'{whose}conformity']:.2f}" for whose in ("", "real_", "base_")]
        cells += [f"{leak['worst_excess']:+.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
