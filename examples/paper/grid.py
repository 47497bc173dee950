"""The paper's grids: depth and widths of the context module, beta, and the penalties of its causal weights.

And how far more updates go; every number of them is a run of its own.

    python -m examples.paper.grid --output_dir paper-grid --scale small --vary beta
    python -m examples.paper.grid --output_dir paper-grid-full --vary depth widths --seeds 0 1 2 3 4

On quad (dependent), end-to-end; every combination of the axes that `--vary` names, all else as in the table.
"""

import itertools
from typing import Any

from .command import plain_parser
from .protocol import floor, run, write
from .quad import quad_world
from .tables import table

AXES: dict[str, list[dict[str, Any]]] = {
    "depth": [{"depth": depth} for depth in (2, 4)],
    "widths": [{"noise_width": n, "concept_width": w} for n in (16, 32) for w in (8, 16, 32)],
    "beta": [{"beta": beta} for beta in (0.5, 1.0, 2.0, 4.0)],
    "group_penalty": [{"group_penalty": weight} for weight in (0.0, 1.0, 10.0, 100.0)],
    "l2_penalty": [{"l2_penalty": weight} for weight in (0.0, 1.0, 10.0, 100.0)],
    "mean_penalty": [{"mean_penalty": weight} for weight in (0.0, 2.5, 25.0, 100.0)],
    "updates": [{"max_train_steps": 1500 * 2**n} for n in range(7)],
}


def main() -> None:
    arguments = plain_parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments.add_argument("--vary", nargs="+", choices=AXES, default=["beta"])
    given = arguments.parse_args()
    world = quad_world(given.scale, dependent=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for point in itertools.product(*(AXES[axis] for axis in given.vary)):
        changes = {name: value for settings in point for name, value in settings.items()}
        label = ", ".join(f"{name} {value:g}" for name, value in changes.items())
        folder = given.output_dir / label.replace(", ", "-").replace(" ", "-")
        for seed in given.seeds:
            runs.setdefault(label, []).append(run(world, "CM end-to-end", seed, folder, changes))
            floors = [floor(world, seed, given.output_dir) for seed in given.seeds]
            text = table(world, None, runs, floors)
            write(given.output_dir / "results.md", text)
            print(text)


if __name__ == "__main__":
    main()
