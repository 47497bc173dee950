"""The paper's MNIST table: six morphological operations on digits; no combinations were published.

    python -m examples.paper.mnist --data_dir mnist --output_dir paper-mnist --scale small

`--data_dir` holds the files of the original distribution (t10k-images-idx3-ubyte.gz ...). The published strengths of
the operations are not known: distances are not comparable with the published ones, only their order. Two pairs of
operations are held out, which the paper does not have.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from hf_causal_context import ConceptSet, Context
from hf_causal_context.data.worlds.digits import read_attributes
from hf_causal_context.training.autoencoder.images import ImageSet

from ..worlds.morphology import CONCEPTS, apply, load_mnist
from .command import parser, run_table
from .protocol import World, at_most

HELD_OUT = (Context("shear", "thickening"), Context("scaled", "thinning"))
SCALES = {
    "full": {"num_train_epochs": 100},
    "small": {"max_train_steps": 4_000, "train_batch_size": 64, "beta": 4.0},
}
_SHARE_HELD_OUT = 0.3


def mnist_world(scale: str, folder: Path) -> World:
    """Digits of one split; the last 30 % are held out in every context."""
    digits, _ = load_mnist(folder, "test" if scale == "small" else "train")
    digits = digits[np.random.default_rng(0).permutation(len(digits))]
    boundary = round(len(digits) * (1 - _SHARE_HELD_OUT))
    trained = (Context(), *map(Context, CONCEPTS))
    concepts = ConceptSet(CONCEPTS)

    @cache
    def training() -> ImageSet:
        return ImageSet.of_arrays({c: apply(digits[:boundary], c)[:, None] for c in trained}, concepts)

    def real(context: Context, num: int, seed: int) -> torch.Tensor:
        chosen = at_most(np.random.default_rng(seed).permutation(np.arange(boundary, len(digits))), num)
        return torch.from_numpy(apply(digits[chosen], context)[:, None])

    widths = {"depth": 2, "noise_width": 15, "concept_width": 5, "resolution": 28, "channels": 1}
    return World("MNIST", concepts, trained, HELD_OUT, training, real, _attributes, SCALES[scale] | widths)


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
    run_table(given, mnist_world(given.scale, given.data_dir), "MNIST")


if __name__ == "__main__":
    main()
