"""Does it compose in images, on a base that saw such images or on one that never did? Beside two peers.

    python -m examples.benchmarks.image_composition --output_dir images-digits
    python -m examples.benchmarks.image_composition --output_dir images-digits --base letter-base --steps 300 600 1200

    python -m examples.benchmarks.image_composition --output_dir images-type --world type --fonts_dir FOLDER \
        --base type-base --methods floor base "singles only" "reweighted pairs" oracle "stacked LoRAs" "a+b-obs"

Bases are made by `examples/pretrain.py`; the packaged one is of digits. Peers are stacked LoRAs, and "a+b-obs": stacked
LoRAs minus one that was trained on the observational set. "few combinations" trains on 30 images of each combination,
too. Every number of updates is a training of its own, with a whole schedule. Every result is a file of its own, so that
the command goes on where it was stopped, and several can share the work (`--methods`, `--steps`, `--loras`). Distances
are sliced Wasserstein to real images that no training saw; the floor is that of as many real images of the kind that
methods train on. Where sets lie apart (the world of edits), the table also says in which share of samples a classifier
of real images finds what was asked for and no more.
"""

import argparse
import json
import time
from pathlib import Path

from hf_causal_context.bases.images import image_grid
from hf_causal_context.evaluation.metrics import sliced_wasserstein
from hf_causal_context.quickstart import BASE

from .image_composition_methods import OBSERVATIONAL, TRAINED, UNTRAINED, Images, Study, train_loras
from .image_composition_table import write_tables
from .image_worlds import World, digit_world, edit_world, type_world


def distances(images: Images, world: World) -> dict[str, float]:
    """Of every context, to twice as many real images."""
    return {
        str(context): sliced_wasserstein(own, world.truth(context, 2 * len(own))) for context, own in images.items()
    }


def chosen_world(name: str, fonts_dir: Path | None) -> World:
    """Return the world of that name."""
    if name == "digits":
        return digit_world()
    if name == "edits":
        return edit_world()
    if fonts_dir is None:
        raise SystemExit("The world type is drawn from a font. Give its folder by --fonts_dir.")
    return type_world(fonts_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--world", choices=("digits", "type", "edits"), default="digits")
    parser.add_argument("--fonts_dir", type=Path, help="folder of the font of type")
    parser.add_argument("--base", type=Path, default=BASE, help="by default the packaged base of digits")
    parser.add_argument("--steps", type=int, nargs="+", default=[300], help="updates: one training for each number")
    methods = {**UNTRAINED, **TRAINED}
    parser.add_argument("--methods", nargs="*", choices=methods, default=list(methods))
    parser.add_argument(
        "--loras", nargs="*", default=[], help=f"train only these concepts or {OBSERVATIONAL!r}, for the peers"
    )
    parser.add_argument("--rows_per_context", type=int, default=1500)
    parser.add_argument("--num_samples", type=int, default=500, help="of every context")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the training")
    arguments = parser.parse_args()
    world = chosen_world(arguments.world, arguments.fonts_dir)
    folder = arguments.output_dir / arguments.base.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    seed = arguments.seed
    settings = {name: getattr(arguments, name) for name in ("world", "rows_per_context", "num_samples")}
    study = Study(
        world, arguments.base, folder / f"seed-{seed}", arguments.rows_per_context, arguments.num_samples, seed
    )
    if arguments.loras:
        for steps in arguments.steps:
            train_loras(study, steps, tuple(arguments.loras))
        return
    for method in arguments.methods:
        for steps in arguments.steps if method in TRAINED else [0]:
            done = folder / f"{method.replace(',', '').replace(' ', '-')}-{steps}-{seed}.json"
            if done.exists():
                if (before := json.loads(done.read_text())["settings"]) != settings:
                    raise SystemExit(f"{done} was made with {before}, not {settings}. Choose another --output_dir.")
                continue
            start = time.perf_counter()
            images = methods[method](study, steps)
            content = {
                "method": method,
                "steps": steps,
                "seed": seed,
                "settings": settings,
                "distances": distances(images, world),
                "exact": {str(c): world.exact(c, own) for c, own in images.items()} if world.apart else {},
                "seconds": time.perf_counter() - start,
            }
            rows = [images[context][:8] for context in world.contexts]
            image_grid(rows, [str(c) or "observational" for c in world.contexts]).save(done.with_suffix(".png"))
            unfinished = done.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(content, indent=1) + "\n")
            unfinished.replace(done)
            print(f"{folder.name}, {method}, {steps} updates: {content['seconds']:.0f} s", flush=True)
    write_tables(arguments.output_dir, world)


if __name__ == "__main__":
    main()
