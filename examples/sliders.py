"""Draw digits over two sliders each: what an adapter makes of one noise, at every pair of strengths.

    hf-causal-context quickstart --output_dir digits-context
    python -m examples.sliders --adapter digits-context --output examples/digits.png

Strengths 0 and 1 were trained, and of pairs none. It is for the adapter that the quickstart makes, or another one of
images with its concepts: thickness, slant, darkness and size. For any adapter there are `hf-causal-context generate
--grid` and `hf-causal-context demo`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hf_causal_context import Context
from hf_causal_context.errors import UserError
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.sampling import generate

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
# The concept from left to right, that from top to bottom, and the seed of the noise.
PANELS = (("thickness", "slant", 1), ("darkness", "size", 5))
PAPER, INK, LABEL = (250, 246, 238), (26, 34, 74), (120, 112, 100)
TILE, MARGIN, SPACE = 84, 44, 28
BLACK = 0.05  # what lies below is noise, and would show the edges of the images


def panel(tiles: Tensor, across: str, down: str) -> Image.Image:
    """Images (rows x columns, 1, H, W) in [0, 1] -> a square of them, as ink on paper, with the names of its axes."""
    side = len(STRENGTHS) * TILE
    image = Image.new("RGB", (MARGIN + side, MARGIN + side), PAPER)
    for number, tile in enumerate(tiles[:, 0].numpy()):
        row, column = divmod(number, len(STRENGTHS))
        level = np.rint(255 * (tile - BLACK).clip(0) / (1 - BLACK)).astype(np.uint8)
        ink = Image.fromarray(level).resize((TILE, TILE), Image.Resampling.BICUBIC)
        image.paste(INK, (MARGIN + column * TILE, MARGIN + row * TILE), ink)
    span = f"from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g}"
    font = ImageFont.load_default(size=17)
    sideways = Image.new("RGB", (side, MARGIN), PAPER)
    ImageDraw.Draw(sideways).text((side / 2, MARGIN / 2), f"{down} {span}", LABEL, font, anchor="mm")
    image.paste(sideways.rotate(-90, expand=True), (0, MARGIN))
    ImageDraw.Draw(image).text((MARGIN + side / 2, MARGIN / 2), f"{across} {span}", LABEL, font, anchor="mm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a .png")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    arguments = parser.parse_args()
    grids = [[Context({across: x, down: y}) for y in STRENGTHS for x in STRENGTHS] for across, down, _ in PANELS]
    try:
        base = StoredAdapter.open(arguments.adapter).pipeline([context for grid in grids for context in grid])
    except (UserError, OSError) as error:
        parser.error(f"{error} This example draws the concepts of the quickstart's adapter: give its folder.")
    panels = []
    for (across, down, seed), contexts in zip(PANELS, grids, strict=True):
        steps = arguments.num_inference_steps
        rows = generate(base, contexts, seeds=[seed], num_inference_steps=steps, batch_size=len(contexts))
        panels.append(panel(torch.cat(rows), across, down))
    width, height = panels[0].size
    image = Image.new("RGB", (len(panels) * (width + SPACE), height + SPACE), PAPER)
    for number, part in enumerate(panels):
        image.paste(part, (number * (width + SPACE), 0))
    image.save(arguments.output)


if __name__ == "__main__":
    main()
