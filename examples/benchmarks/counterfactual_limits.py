"""What limits edits that were trained on pairs: the truth in the adapter's place, at some noise levels.

    python -m examples.benchmarks.counterfactual_benchmark --output_dir edits-digits --num_images 32 --seed 1 \
        --methods "no edit" "this adapter, trained on pairs"
    python -m examples.benchmarks.counterfactual_limits --output_dir edits-digits --num_images 32 --seed 1

Reads what the first command trained. With the images x_0, the true edits y_0 and what the base takes for the clean
image x, an edit is exact if the denoiser in the context takes y_0 + x - x_0 for its clean image: errors of the base are
shared by the image and its edit, and cancel. This is what stands in for the adapter.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_causal_context import Context, intervene
from hf_causal_context.inference.counterfactuals import Sampler
from hf_causal_context.quickstart import BASE

from .counterfactual_metrics import Judge, interval
from .counterfactual_study import adapted_base, digit_task, floats
from .image_composition_methods import Study

SCORES = ("RMSE", "moved, measured", "unmoved")
CASES: dict[str, Callable[[float], bool]] = {
    "never": lambda noise: False,
    **{f"above {level}": lambda noise, level=level: noise > level for level in (0.95, 0.8, 0.6, 0.4, 0.2)},
}


@torch.no_grad()
def edited(sampler: Sampler, factual: Tensor, true: Tensor, context: Context, ideal: Callable[[float], bool]) -> Tensor:
    """Return edits (N, 1, 32, 32) in [0, 1], with the truth at noise levels that are ideal."""
    images, partners = 2 * factual - 1, 2 * true - 1
    grid, path = sampler.grid(images), sampler.backward(images, Context()).path
    y = path[0]
    for number, step in enumerate(grid):
        x, following = path[number], path[number + 1]
        with intervene(sampler.base.pipe, Context()):
            x_clean = sampler.predict_clean(x, step, {})
        with intervene(sampler.base.pipe, context):
            y_clean = sampler.predict_clean(y, step, {})
        if ideal(step.sigma):
            y_clean = partners + x_clean - images
        y = following + step.mean(y, y_clean) - step.mean(x, x_clean)
    return sampler.base.decode_images(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="that of counterfactual_benchmark")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--rows_per_context", type=int, default=1500)
    parser.add_argument("--max_train_steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    task = digit_task(arguments.num_images, arguments.seed)
    folder = arguments.output_dir / f"seed-{arguments.seed}"
    study = Study(task.world, BASE, folder, arguments.rows_per_context, arguments.num_images, arguments.seed)
    base = adapted_base(study, arguments.max_train_steps, task.reweighted, paired=True)
    sampler, judge = Sampler(base, arguments.num_inference_steps, None, None), Judge(task, folder)
    factual = floats(task.factual[0])
    print(f"| the truth at noise | {' | '.join(SCORES)} |\n|---{'|---' * len(SCORES)}|")
    for name, ideal in CASES.items():
        scores = []
        for context in task.world.groups["singles"]:
            made = edited(sampler, factual, floats(task.truth(context)), context, ideal)
            scores.append(judge.edits(context, made))
        cells = [interval(np.mean([each[title] for each in scores], axis=0)) for title in SCORES]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
