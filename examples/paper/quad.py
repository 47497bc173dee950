"""The paper's quad tables: six concepts, nine pairs of them held out.

    python -m examples.paper.quad --output_dir paper-quad --scale small     # minutes on two CPU cores
    python -m examples.paper.quad --output_dir paper-quad-full              # the full protocol, for a GPU

`--world independent` removes all edges between the latents. It stands in for the published independent data, a
download whose generator differs: its numbers are not comparable with the published ones. The small scale has 16 x 16
images, 4,000 of each context, 6,000 updates of 64 images for every method, and beta 4, with which so few updates go
further; so its distances are not comparable with the published ones either, only their order.
"""

from functools import cache

import numpy as np
import torch

from hf_causal_context import ConceptSet, Context
from hf_causal_context.training.autoencoder.images import ImageSet

from ..worlds.quad import CONCEPTS, HELD_OUT, read_quad, sample_quad
from .command import parser, run_table
from .protocol import World

SCALES = {
    "full": ({"resolution": 64, "num_train_epochs": 100}, 50_000),
    "small": ({"resolution": 16, "max_train_steps": 6_000, "train_batch_size": 64, "beta": 4.0}, 4_000),
}
_HELD_OUT_SEEDS = 10**6


def quad_world(scale: str, dependent: bool) -> World:
    """The world at one scale."""
    settings, rows = SCALES[scale]
    size = settings["resolution"]
    trained = (Context(), *map(Context, CONCEPTS))
    concepts = ConceptSet(CONCEPTS)

    @cache
    def training() -> ImageSet:
        arrays = {
            context: sample_quad(rows, context, seed, size=size, dependent=dependent)[0]
            for seed, context in enumerate(trained)
        }
        return ImageSet.of_arrays(arrays, concepts)

    def real(context: Context, num: int, seed: int) -> torch.Tensor:
        return torch.from_numpy(sample_quad(num, context, _HELD_OUT_SEEDS + seed, size=size, dependent=dependent)[0])

    def attributes(images: torch.Tensor) -> dict[str, np.ndarray]:
        read = read_quad(images)
        angles = 2 * np.pi * read["orientation"]
        return {
            "hues": np.stack([read[f"quad{i}"] for i in range(1, 5)], axis=1),
            # A shape that cannot be told from all quarters counts as the smallest; it and circles have no direction.
            "size": np.nan_to_num(read["size"])[:, None],
            "orientation": np.nan_to_num(np.stack([np.cos(angles), np.sin(angles)], axis=1)),
        }

    widths = {"depth": 2, "noise_width": 32, "concept_width": 8}
    return World(
        f"quad {'dependent' if dependent else 'independent'}",
        concepts,
        trained,
        HELD_OUT,
        training,
        real,
        attributes,
        settings | widths,
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--world", choices=("dependent", "independent"), default="dependent")
    given = arguments.parse_args()
    world = quad_world(given.scale, given.world == "dependent")
    run_table(given, world, world.name if given.world == "dependent" else None)


if __name__ == "__main__":
    main()
