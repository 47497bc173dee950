"""How much do regions bleed? Two digits side by side, of which the left one has a context of its own.

    python -m examples.benchmarks.regions --adapter digits-context --output regions.png

The base draws 32 x 64 pixels. Told is how far pixels are from those of the empty context, root mean square in [0, 1]:
in the region, outside of it, and in the region where the whole image has its context. Rows of the image: the empty
context, thickness, slant, and thickness on the left beside slant on the right.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_causal_context import intervene, load_context_adapter
from hf_causal_context.bases.images import image_grid
from hf_causal_context.bases.loading import load_base
from hf_causal_context.quickstart import BASE

from .digit_peers import NUM_INFERENCE_STEPS

SIDE = 32


def samples(pipe: Any, num: int, context: Any, masks: Any = None) -> Tensor:
    """Images (num, 1, 32, 64) in [0, 1], of the same noise in every context."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(num)]
    with intervene(pipe, context, masks=masks):
        made = pipe(batch_size=num, generator=generators, num_inference_steps=NUM_INFERENCE_STEPS, output_type="np")
    return torch.as_tensor(made.images).movedim(-1, 1).float()


def distance(images: Tensor, others: Tensor) -> float:
    """Root mean square."""
    return float((images - others).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="that of the quickstart")
    parser.add_argument("--output", type=Path, default=Path("regions.png"), help="the image")
    parser.add_argument("--num_samples", type=int, default=24)
    arguments = parser.parse_args()
    pipe: Any = load_base(str(BASE)).pipe
    load_context_adapter(pipe, arguments.adapter)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_to_config(sample_size=(SIDE, 2 * SIDE))
    left = np.zeros((SIDE, 2 * SIDE), dtype=np.float32)
    left[:, :SIDE] = 1
    num = arguments.num_samples
    empty = samples(pipe, num, ())
    whole = {name: samples(pipe, num, name) for name in ("thickness", "slant")}
    print("| left | in the region | outside of it | in the region, if everywhere |\n|---|---|---|---|")
    for name, everywhere in whole.items():
        part = samples(pipe, num, {"left": name}, {"left": left})
        inside, outside = (distance(part[..., half], empty[..., half]) for half in (slice(SIDE), slice(SIDE, None)))
        if_everywhere = distance(everywhere[..., :SIDE], empty[..., :SIDE])
        print(f"| {name} | {inside:.3f} | {outside:.3f} | {if_everywhere:.3f} |")
    both = samples(pipe, num, {"left": "thickness", "right": "slant"}, {"left": left, "right": 1 - left})
    rows = [row[:8] for row in (empty, *whole.values(), both)]
    image_grid(rows, ["obs", *whole, "thickness | slant"]).save(arguments.output)


if __name__ == "__main__":
    main()
