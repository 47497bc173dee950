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

from hf_causal_context import Context
from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.inference.counterfactuals import Sampler
from hf_causal_context.inference.sampling_steps import Step
from hf_causal_context.quickstart import BASE

from .counterfactual_benchmark import COMPARED
from .counterfactual_metrics import Judge, interval
from .counterfactual_study import adapted_base, digit_task, floats
from .image_composition_methods import Study

CASES: dict[str, Callable[[float], bool]] = {
    "never": lambda noise: False,
    **{f"above {level}": lambda noise, level=level: noise > level for level in (0.95, 0.8, 0.6, 0.4, 0.2)},
}


class IdealSampler(Sampler):
    """Edits of images (N, 1, 32, 32) in [0, 1], with the truth in the adapter's place where noise levels are ideal."""

    @torch.no_grad()
    def __init__(self, base: DiffusionBase, steps: int, images: Tensor) -> None:
        super().__init__(base, steps, None, None)
        self._images = images
        self._of_images: dict[float, Tensor] = {}  # time -> what the base takes for them
        self._ideal, self._change = CASES["never"], torch.zeros(())
        self._found = self.backward(2 * images - 1, Context())

    @torch.no_grad()
    def edit(self, context: Context, true: Tensor, ideal: Callable[[float], bool]) -> Tensor:
        """Return edits (N, 1, 32, 32), which should be the true ones."""
        self._ideal, self._change = ideal, 2 * (true - self._images)
        return self.base.decode_images(self.forward(self._found, [context]))

    def predict_clean(self, x: Tensor, step: Step, conditions: dict[str, Tensor]) -> Tensor:
        if self._ideal(step.sigma):
            return self._of_images[step.time] + self._change
        clean = super().predict_clean(x, step, conditions)
        self._of_images.setdefault(step.time, clean)  # the way from the images to their noise comes first
        return clean


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
    sampler = IdealSampler(base, arguments.num_inference_steps, floats(task.factual[0]))
    judge = Judge(task, folder)
    print(f"| the truth at noise | {' | '.join(COMPARED)} |\n|---{'|---' * len(COMPARED)}|")
    for name, ideal in CASES.items():
        scores = []
        for context in task.world.groups["singles"]:
            scores.append(judge.edits(context, sampler.edit(context, floats(task.truth(context)), ideal)))
        cells = [interval(np.mean([each[title] for each in scores], axis=0)) for title in COMPARED]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
