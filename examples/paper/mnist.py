"""The paper's MNIST table: six morphological operations on digits; no combinations were published.

    python -m examples.paper.mnist --data_dir mnist --output_dir paper-mnist --scale small

`--data_dir` holds the files of the original distribution (train-images-idx3-ubyte.gz ...). Models are trained on the
training digits and compared with the test digits. The published strengths of the operations are not known: distances
are not comparable with the published ones, only their order. Two pairs of operations are held out, which the paper does
not have. With `--hierarchical` digits have a margin of two pixels: 32 x 32.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from hf_causal_context import ConceptSet, Context
from hf_causal_context.data.worlds.digits import read_attributes
from hf_causal_context.training.autoencoder.images import ImageSet

from ..worlds.morphology import CONCEPTS, SIDE, apply, load_mnist
from .command import parser, run_table
from .protocol import World, at_most

HELD_OUT = (Context("shear", "thickening"), Context("scaled", "thinning"))
SCALES = {
    "full": {"num_train_epochs": 100},
    "small": {"max_train_steps": 4_000, "train_batch_size": 64},
}
_MARGIN = 2  # pixels around a digit where the side must be a multiple of 8


def mnist_world(scale: str, folder: Path, hierarchical: bool = False) -> World:
    """The training digits to train on, and the test digits to compare with."""
    trained = (Context(), *map(Context, CONCEPTS))
    concepts = ConceptSet(CONCEPTS)
    margin = _MARGIN if hierarchical else 0

    def images(digits: np.ndarray, context: Context) -> np.ndarray:
        return np.pad(apply(digits, context), ((0, 0), (margin, margin), (margin, margin)))[:, None]

    @cache
    def training() -> ImageSet:
        digits, _ = load_mnist(folder, "train")
        return ImageSet.of_arrays({context: images(digits, context) for context in trained}, concepts)

    @cache  # all methods are compared with the same images, and making them takes long
    def real(context: Context, num: int, seed: int) -> torch.Tensor:
        digits, _ = load_mnist(folder, "test")
        chosen = at_most(np.random.default_rng(seed).permutation(len(digits)), num)
        return torch.from_numpy(images(digits[chosen], context))

    widths = {"depth": 2, "noise_width": 15, "concept_width": 5, "resolution": SIDE + 2 * margin, "channels": 1}
    settings = SCALES[scale] | widths
    if hierarchical and scale == "small":
        settings |= {"beta": 4.0, "mean_penalty": 2.5}  # what its table was measured with
    return World("MNIST", concepts, trained, HELD_OUT, training, real, _attributes, settings)


def _attributes(images: torch.Tensor) -> dict[str, np.ndarray]:
    """Thickness, slant and height of the ink in its own units, and the place of its center; 0 without ink."""
    thickness, _, slant, height = np.nan_to_num(read_attributes(images[:, 0].numpy())).T[..., None]
    ink = images[:, 0].double()
    places = torch.arange(ink.shape[1]).double()
    center = torch.stack([ink.sum(2) @ places, ink.sum(1) @ places], dim=1) / ink.sum((1, 2))[:, None].clamp(min=1)
    return {"thickness": thickness, "slant": slant, "height": height, "place": center.numpy()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data_dir", type=Path, required=True)
    given = arguments.parse_args()
    world = mnist_world(given.scale, given.data_dir, given.hierarchical)
    run_table(given, world, "MNIST (NVAE)" if given.hierarchical else "MNIST")


if __name__ == "__main__":
    main()
