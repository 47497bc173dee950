"""The paper's 3DIdent table: rendered images, intervened on background, object and spotlight; their pairs held out.

    python -m examples.paper.three_d_ident --data_dir 3dident --output_dir paper-3dident

`--data_dir` holds one folder of PNG files for each context: obs, bg, obj, sl, bg-obj, bg-sl, obj-sl. The published
numbers are of an NVAE, whose top latent is the context module: `--hierarchical` has a small model of that kind, and
without it the table is of the lightweight VAE.
"""

from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from hf_causal_context import Context
from hf_causal_context.bases.images import read_image
from hf_causal_context.training.autoencoder.images import ImageSet

from ..worlds.three_d_ident import CONCEPTS, load_3dident
from .command import parser, run_table
from .protocol import World, at_most

SCALES = {
    "full": {"resolution": 64, "num_train_epochs": 100},
    "small": {"resolution": 32, "max_train_steps": 2_000, "train_batch_size": 64, "beta": 4.0},
}
_SHARE_HELD_OUT = 0.64  # 2,560 of 4,000: a distance and its floor take 1,280 different ones each


def ident_world(scale: str, folder: Path, hierarchical: bool = False) -> World:
    """A share of the images of every trained context is held out, too."""
    data = load_3dident(folder)
    size = SCALES[scale]["resolution"]
    trained = (Context(), *map(Context, CONCEPTS))

    @cache
    def parts() -> tuple[ImageSet, ImageSet]:
        return ImageSet.of_data(data, size, 3).split(_SHARE_HELD_OUT, 0)

    @cache
    def images(context: Context) -> torch.Tensor:
        if context in trained:
            return parts()[1].of(context)
        rows = data.held_out[str(context)]
        return torch.from_numpy(np.stack([read_image(p, 3, size) for p in cast(Any, rows)[data.content_column]]))

    def real(context: Context, num: int, seed: int) -> torch.Tensor:
        available = images(context)
        return available[at_most(np.random.default_rng(seed).permutation(len(available)), num)]

    held_out = tuple(map(Context.parse, data.held_out))
    settings = SCALES[scale] | {"depth": 2, "noise_width": 32, "concept_width": 8}
    if hierarchical:
        settings["mean_penalty"] = 2.5  # what its table was measured with
    return World("3DIdent", data.concepts, trained, held_out, lambda: parts()[0], real, _attributes, settings)


def _attributes(images: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean color of the corners, which show the background, and of the middle, which shows the object; in [0, 1]."""
    margin = images.shape[-1] // 8
    outer = torch.cat([images[..., :margin], images[..., -margin:]], dim=-1)
    corners = torch.cat([outer[..., :margin, :], outer[..., -margin:, :]], dim=-2)
    middle = images[..., 3 * margin : -3 * margin, 3 * margin : -3 * margin]
    return {
        name: part.double().mean((2, 3)).div(255).numpy()
        for name, part in (("background", corners), ("object", middle))
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data_dir", type=Path, required=True)
    given = arguments.parse_args()
    run_table(given, ident_world(given.scale, given.data_dir, given.hierarchical), "3DIdent (NVAE)")


if __name__ == "__main__":
    main()
