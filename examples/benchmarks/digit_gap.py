"""Does it compose on a base that never saw such images? The quickstart's digits on any base, beside two peers.

    python -m examples.pretrain_digits --output_dir letter-base --fonts_dir FOLDER
    python -m examples.benchmarks.digit_gap --output_dir digit-gap
    python -m examples.benchmarks.digit_gap --output_dir digit-gap --base letter-base --steps 300 600 1200 2400

Without `--base` it is the packaged base of digits, which has no gap. Peers are stacked LoRAs, and "a+b-obs": stacked
LoRAs minus one that was trained on the observational set. Every number of updates is a training of its own, with a
whole schedule. Every result is a file of its own, so that the command goes on where it was stopped, and several can
share the work (`--methods`, `--steps`, `--loras`). Distances are sliced Wasserstein to real images of glyphs that
training never saw; the floor is that of as many real images of the training glyphs.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from hf_causal_context.bases.images import image_grid
from hf_causal_context.data.worlds.digits import CONCEPTS
from hf_causal_context.evaluation.metrics import sliced_wasserstein
from hf_causal_context.quickstart import BASE, CONTEXTS, reference_images

from .digit_gap_methods import OBSERVATIONAL, TRAINED, UNTRAINED, Images, Study, train_loras
from .digit_gap_table import write_tables


def distances(images: Images) -> dict[str, float]:
    """Of every context, to twice as many real images."""
    result = {}
    for context, own in images.items():
        reference = torch.from_numpy(reference_images(context, 2 * len(own)))[:, None] / 255
        result[str(context)] = sliced_wasserstein(own, reference)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=BASE, help="by default the packaged base of digits")
    parser.add_argument("--steps", type=int, nargs="+", default=[300], help="updates: one training for each number")
    methods = {**UNTRAINED, **TRAINED}
    parser.add_argument("--methods", nargs="*", choices=methods, default=list(methods))
    parser.add_argument(
        "--loras", nargs="*", choices=(*CONCEPTS, OBSERVATIONAL), default=[], help="train only these, for the peers"
    )
    parser.add_argument("--rows_per_context", type=int, default=1500)
    parser.add_argument("--num_samples", type=int, default=500, help="of every context")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the training")
    arguments = parser.parse_args()
    folder = arguments.output_dir / arguments.base.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    seed, settings = arguments.seed, {name: getattr(arguments, name) for name in ("rows_per_context", "num_samples")}
    study = Study(arguments.base, folder / f"seed-{seed}", seed=seed, **settings)
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
                "distances": distances(images),
                "seconds": time.perf_counter() - start,
            }
            rows = [images[context][:8] for context in CONTEXTS]
            image_grid(rows, [str(c) or "observational" for c in CONTEXTS]).save(done.with_suffix(".png"))
            unfinished = done.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(content, indent=1) + "\n")
            unfinished.replace(done)
            print(f"{folder.name}, {method}, {steps} updates: {content['seconds']:.0f} s", flush=True)
    write_tables(arguments.output_dir)


if __name__ == "__main__":
    main()
