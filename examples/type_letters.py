"""Draw what an adapter of type learned beside the font itself: each concept, and combinations that it never saw.

    python -m examples.type_letters --adapter images-type/type-base/seed-0/singles-only-200 --fonts_dir FOLDER \
        --output examples/type.png

`examples/benchmarks/README.md#type` says how the adapter was made. A column of samples has one noise, a column of real
images one character and one noise of the axes.
"""

import argparse
from pathlib import Path

from hf_causal_context import Context
from hf_causal_context.bases.images import side_by_side
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.sampling import generate

from .benchmarks.image_worlds import type_world

COLUMNS = 8
SHOWN = (
    *("", "weight", "width", "slant", "contrast"),
    *("weight+width", "contrast+slant", "contrast+weight", "slant+weight+width", "contrast+slant+weight+width"),
    "slant=0.5+weight=1.5",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--fonts_dir", type=Path, required=True, help="folder of ScienceGothic.ttf")
    parser.add_argument("--output", type=Path, required=True, help="a .png")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the first column")
    arguments = parser.parse_args()
    contexts = [Context.parse(text) for text in SHOWN]
    seeds = range(arguments.seed, arguments.seed + COLUMNS)
    base = StoredAdapter.open(arguments.adapter).pipeline()
    steps = arguments.num_inference_steps
    samples = generate(base, contexts, seeds=seeds, num_inference_steps=steps, batch_size=COLUMNS)
    world = type_world(arguments.fonts_dir)
    real = [world.truth(context, COLUMNS) for context in contexts]
    titles = ("the font", "samples; trained on the first five rows only")
    side_by_side(real, samples, [str(context) or "obs" for context in contexts], titles).save(arguments.output)


if __name__ == "__main__":
    main()
