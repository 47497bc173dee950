"""How true are edits of a given image? Composition, effectiveness, minimality, realism, and the truth itself.

    python -m examples.benchmarks.counterfactual_benchmark --output_dir edits-digits
    python -m examples.benchmarks.counterfactual_benchmark --output_dir edits-morpho --world morpho_mnist \
        --mnist_dir FOLDER --public_dir FOLDER

The second world is that of a public benchmark (Melistas et al., "Benchmarking Counterfactual Image Generation", NeurIPS
2024; its protocol, rebuilt data): the published test images of Morpho-MNIST are edited, and everything is trained on
images that are rebuilt from MNIST by the published recipe. An intervention sets thickness or intensity to one of two
values, while the benchmark draws them. Digits are not intervened on.

Every method's edits are a file of their own, and so is all that is trained, so that the command goes on where it was
stopped. Intervals are 95 % over images, of one training of each method. All methods edit the same images, so the last
tables compare them image by image: an interval above zero is an error beyond chance.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_causal_context import Context
from hf_causal_context._files import complete_or_absent
from hf_causal_context.bases.images import image_grid
from hf_causal_context.quickstart import BASE

from . import counterfactual_methods as methods
from .counterfactual_metrics import Judge, interval
from .counterfactual_study import (
    Task,
    adapted_base,
    digit_task,
    floats,
    morpho_task,
    prepare_base,
    trained_autoencoder,
)
from .image_composition_methods import Study

TRUTH, NO_EDIT, OURS, PAIRED = "the truth", "no edit", "this adapter", "this adapter, trained on pairs"
METHODS = (NO_EDIT, "autoencoder", "SDEdit", "DDIM inversion", "stacked LoRAs", OURS, PAIRED)
NULL_EDITS, NULL_IMAGES = 10, 16  # one after the other
COMPARED = ("RMSE", "moved, measured", "unmoved")  # in each context
SETTINGS = (
    *("world", "num_images", "num_inference_steps", "rows_per_context"),
    *("base_steps", "max_train_steps", "autoencoder_steps"),
)


def chosen_task(arguments: argparse.Namespace) -> Task:
    """Return the task of that world."""
    if arguments.world == "digits":
        return digit_task(arguments.num_images, arguments.seed)
    if not (arguments.mnist_dir and arguments.public_dir):
        raise SystemExit("morpho_mnist is made of MNIST and of Morpho-MNIST's test images: --mnist_dir, --public_dir.")
    return morpho_task(arguments.num_images, arguments.seed, arguments.mnist_dir, arguments.public_dir)


def check_settings(folder: Path, settings: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Note the settings in a folder, and refuse one that holds what other settings made.

    Folders without this note have some of the settings beside the edits, and the others were the defaults.
    """
    note = folder / "settings.json"
    files = [note] if note.exists() else sorted({*folder.glob("seed-*/*.pt")} - {*folder.glob("seed-*/predictor.pt")})
    for file in files:
        stored = defaults | (json.loads(file.read_text()) if file == note else torch.load(file)["settings"])
        if changed := {name: value for name, value in settings.items() if stored[name] != value}:
            before = {name: stored[name] for name in changed}
            raise SystemExit(f"{file} was made with {before}, not {changed}. Choose another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings, indent=2) + "\n")


def edits_of(method: str, task: Task, study: Study, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Return edits to every context, and what is left of the images after 1 and more edits that change nothing."""
    steps = arguments.num_inference_steps
    if method == NO_EDIT:
        edit = methods.no_edit
    elif method == "autoencoder":
        edit = methods.autoencoder(trained_autoencoder(study, arguments.autoencoder_steps))
    else:
        make = {
            OURS: methods.ours,
            PAIRED: methods.ours,
            "SDEdit": methods.sdedit,
            "DDIM inversion": methods.ddim_inversion,
            "stacked LoRAs": partial(methods.stacked_loras, study=study, updates=arguments.max_train_steps),
        }[method]
        edit = make(adapted_base(study, arguments.max_train_steps, task.reweighted, method == PAIRED), steps)
    factual = floats(task.factual[0])
    contexts = task.world.contexts[1:]
    made = {str(context): images for context, images in zip(contexts, edit(factual, contexts), strict=True)}
    kept = factual[:NULL_IMAGES]
    for number in range(1, NULL_EDITS + 1):
        kept = edit(kept, [Context()])[0]
        if number in (1, NULL_EDITS):
            made[f"null {number}"] = kept
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--world", choices=("digits", "morpho_mnist"), default="digits")
    parser.add_argument("--mnist_dir", type=Path, help="the IDX files of MNIST, for morpho_mnist")
    parser.add_argument("--public_dir", type=Path, help="the published test images of Morpho-MNIST")
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--rows_per_context", type=int, default=1500)
    parser.add_argument("--base_steps", type=int, default=1000, help="of the base of morpho_mnist, for all seeds")
    parser.add_argument("--max_train_steps", type=int, default=300, help="of the adapter, and of each LoRA")
    parser.add_argument("--autoencoder_steps", type=int, default=1500)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--seed", type=int, default=0, help="of the images, the training sets and the trainings")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    check_settings(arguments.output_dir, settings, {name: parser.get_default(name) for name in SETTINGS})
    task = chosen_task(arguments)
    world, folder = task.world, arguments.output_dir / f"seed-{arguments.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    base = BASE
    if arguments.world == "morpho_mnist":
        rows = 4 * arguments.rows_per_context
        base = prepare_base(world, arguments.output_dir / "base", arguments.base_steps, rows)
    study = Study(world, base, folder, arguments.rows_per_context, arguments.num_images, arguments.seed)
    edits: dict[str, dict[str, Tensor]] = {}
    for method in arguments.methods:
        file = folder / f"{method.replace(', ', '-').replace(' ', '-')}.pt"
        if not file.exists():
            with complete_or_absent(file) as unfinished:
                torch.save({"settings": settings, "edits": edits_of(method, task, study, arguments)}, unfinished)
            print(f"{method}: done", flush=True)
        edits[method] = torch.load(file)["edits"]
    factual = floats(task.factual[0])
    edits[TRUTH] = {str(context): floats(task.truth(context)) for context in world.contexts[1:]}
    edits[TRUTH] |= {f"null {number}": factual[:NULL_IMAGES] for number in (1, NULL_EDITS)}
    write_tables(task, Judge(task, folder), edits)
    shown = {"": factual, **{f"{c}: truth": edits[TRUTH][str(c)] for c in world.contexts[1:]}}
    for method in {OURS, PAIRED} & edits.keys():
        shown |= {f"{c}: {method}": edits[method][str(c)] for c in world.contexts[1:]}
    image_grid([images[:8] for images in shown.values()], list(shown)).save(folder / "grid.png")


def write_tables(task: Task, judge: Judge, edits: dict[str, dict[str, Tensor]]) -> None:
    """Print the table of all metrics, errors in each context, and how much larger the others' are, image by image."""
    scores = {
        method: {context: judge.edits(context, made[str(context)]) for context in task.world.contexts[1:]}
        for method, made in edits.items()
    }
    factual = floats(task.factual[0])[:NULL_IMAGES]
    names = [f"{n} null: {kind}" for n in (1, NULL_EDITS) for kind in ("L1", "features")]
    print(f"| composition | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for method, made in edits.items():
        found = [judge.composition(factual, made[f"null {n}"]) for n in (1, NULL_EDITS)]
        print(f"| {method} | {' | '.join(interval(part[kind], 4) for part in found for kind in part)} |")
    titles = list(next(iter(scores[TRUTH].values())))
    for group, contexts in task.world.groups.items():
        print(f"\n| {group} | {' | '.join(titles)} |\n|---{'|---' * len(titles)}|")
        for method, by_context in scores.items():
            cells = [interval(np.mean([by_context[c][title] for c in contexts], axis=0)) for title in titles]
            print(f"| {method} | {' | '.join(cells)} |")
    for title in COMPARED:
        print(f"\n| {title} | {' | '.join(scores)} |\n|---{'|---' * len(scores)}|")
        for context in task.world.contexts[1:]:
            values = [interval(by_context[context][title]) for by_context in scores.values()]
            print(f"| {context} | {' | '.join(values)} |")
    if not (found := [method for method in (PAIRED, OURS) if method in scores]):
        return
    ours = found[0]
    others = [method for method in scores if method not in (TRUTH, ours)]
    for title in COMPARED:
        print(f"\n| {title}, more than {ours} | {' | '.join(others)} |\n|---{'|---' * len(others)}|")
        for context in task.world.contexts[1:]:
            values = [interval(scores[method][context][title] - scores[ours][context][title]) for method in others]
            print(f"| {context} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
