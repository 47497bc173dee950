"""Equal steps? What the digits' adapter does at a quarter, a half ... of each dial, before and after calibration.

Steps are read as attributes of the images (pixels of thickness, level of the ink, shear, height), which neither the
training nor the calibration knows, from seeds that the calibration did not see.

    hf-causal-context quickstart
    python -m examples.benchmarks.strengths data digits-images
    hf-causal-context evaluate --calibrate --adapter digits-context --train_data_dir digits-images \
        --output_dir digits-report --num_samples 128 --num_seeds 1 --num_inference_steps 15 --batch_size 64 \
        --contexts obs
    python -m examples.benchmarks.strengths measure digits-context
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hf_causal_context import Context
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data.worlds.digits import CONCEPTS, read_attributes, sample_digits
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.pipelines import load_context_adapter
from hf_causal_context.inference.sampling import generate
from hf_causal_context.quickstart import BASE

from .digit_peers import NUM_INFERENCE_STEPS

DIALS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ROWS = 300
SEEDS = range(5000, 5096)


def write_data(folder: Path) -> None:
    """Write a folder per concept and strength: what the truth is at strengths."""
    contexts = [Context(), *(Context({name: dial}) for name in CONCEPTS for dial in DIALS[1:])]
    for number, context in enumerate(contexts):
        place = folder / (str(context) or "obs")
        place.mkdir(parents=True)
        for i, image in enumerate(sample_digits(ROWS, context, seed=500 + number)[0]):
            Image.fromarray(image).save(place / f"{i}.png")


def measure(adapter: Path) -> None:
    """Print, for each concept, how far each position goes on the way from 0 to 1: the truth, before and after."""
    config = StoredAdapter.open(adapter).config
    base = load_base(str(BASE))
    load_context_adapter(base.pipe, adapter)
    print(f"| concept | | {' | '.join(f'{dial:g}' for dial in DIALS)} | largest / smallest step to 1 |")
    print("|---" * (len(DIALS) + 3) + "|")
    for column, name in enumerate(CONCEPTS):
        asked = [Context({name: dial}) for dial in DIALS]
        images = {"the world": [sample_digits(2 * ROWS, context, seed=77)[0] for context in asked]}
        for label, contexts in (("before", asked), ("calibrated", [config.calibrated(each) for each in asked])):
            rows = generate(base, contexts, seeds=SEEDS, num_inference_steps=NUM_INFERENCE_STEPS, batch_size=64)
            images[label] = [(255 * row[:, 0]).round().byte().numpy() for row in rows]
        for label, sets in images.items():
            read = np.array([np.nanmean(read_attributes(each), axis=0)[column] for each in sets])
            way = (read - read[0]) / (read[DIALS.index(1.0)] - read[0])
            steps = np.diff(way[: DIALS.index(1.0) + 1])
            ratio = f"{steps.max() / steps.min():.2f}" if steps.min() > 0 else "-"
            print(f"| {name} | {label} | {' | '.join(f'{value:.2f}' for value in way + 0.0)} | {ratio} |", flush=True)


if __name__ == "__main__":
    {"data": write_data, "measure": measure}[sys.argv[1]](Path(sys.argv[2]))
