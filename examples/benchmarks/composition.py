"""Does it compose? Every method on one frozen base, with the same data, updates and rank, against the truth.

    python -m examples.benchmarks.composition --output_dir composition
    python -m examples.benchmarks.composition --output_dir composition-gap --worlds dependent --base_world independent

The second is what users have: a base that was not trained on their observational set. The data are vectors of a known
causal world (`examples/worlds/vectors.py`), dependent and independent; `--mixing_seed` makes another world of the same
latents. Every result is a file of its own, so that the command goes on where it was stopped, and several can share the
work (`--worlds`, `--seeds`, `--methods`). Distances are sliced Wasserstein to fresh true vectors; the floor is that of
as many true vectors.
"""

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_causal_context import ConceptSet, Context
from hf_causal_context.evaluation.metrics import sliced_wasserstein

from ..worlds.vectors import CONCEPTS, latent_model, sample_vectors
from .causal_sliders import SLIDERS
from .composition_methods import METHODS as OTHERS
from .composition_methods import Sampler, Study
from .composition_table import write_tables
from .vector_flow import VectorFlow, train_base

METHODS = {**OTHERS, **SLIDERS}
WORLDS = ("dependent", "independent")
ROWS_PER_CONTEXT = 20_000
NUM_SAMPLES = 1_500
NUM_REFERENCE = 3_000
SINGLES = tuple(Context(concept) for concept in CONCEPTS)
PAIRS, TRIPLES = (tuple(Context(*names) for names in combinations(CONCEPTS, size)) for size in (2, 3))
EVERYTHING = Context(*CONCEPTS)
JUDGED = (Context(), *SINGLES, *PAIRS, *TRIPLES[::4], EVERYTHING)  # five of the twenty triples, to save time


@dataclass(frozen=True)
class World:
    """Where vectors come from: with or without edges between the latents, through one of many mixings."""

    name: str
    mixing_seed: int

    @property
    def dependent(self) -> bool:
        """Whether the latents have edges."""
        return self.name == "dependent"

    def vectors(self, context: Context, num: int, seed: int) -> Tensor:
        """Return vectors (num, D) of a context."""
        return torch.from_numpy(
            sample_vectors(num, context, seed, dependent=self.dependent, mixing_seed=self.mixing_seed)[0]
        )


def make_study(world: World, seed: int, arguments: argparse.Namespace) -> Study:
    """The data of a world, and the base of all seeds, trained on an observational set of its own or another world."""
    first = 1000 * (seed + 1)  # of the seeds: every set has noise of its own
    everything = (Context(), *SINGLES, *PAIRS, *TRIPLES, EVERYTHING)
    sets = {c: world.vectors(c, ROWS_PER_CONTEXT, first + i) for i, c in enumerate(everything)}
    base_world = World(arguments.base_world or world.name, world.mixing_seed)
    path = arguments.output_dir / f"base-{base_world.name}-{base_world.mixing_seed}.safetensors"
    base = VectorFlow().to(arguments.device)
    if path.exists():
        base.load_state_dict(load_file(path))
    else:
        train_base(base, base_world.vectors(Context(), ROWS_PER_CONTEXT, 1000), arguments.base_steps)
        save_file(base.state_dict(), path)
    base.requires_grad_(False).eval()
    trained = {context: sets[context] for context in (Context(), *SINGLES)}
    model = latent_model(world.dependent)
    causes = {name: model.causes(name) for name in CONCEPTS}

    def true_ratios() -> Tensor:
        seeds = range(first, first + len(trained))
        drawn = [
            sample_vectors(ROWS_PER_CONTEXT, context, s, dependent=world.dependent)[1]
            for context, s in zip(trained, seeds, strict=True)
        ]
        latents = model.deviations() * np.concatenate(drawn)
        return torch.from_numpy(np.stack([model.log_ratio(latents, name) for name in CONCEPTS], axis=1))

    size = (arguments.steps, arguments.batch_size)
    return Study(base, ConceptSet(CONCEPTS), trained, sets, PAIRS, causes, seed, *size, true_ratios)


def truth(world: World) -> Sampler:
    """Fresh vectors of the world itself, in place of samples."""
    return lambda context, num, seed: world.vectors(context, num, 2 * 10**6 + _seed_of(context, seed))


def _seed_of(context: Context, seed: int) -> int:
    return 100 * seed + JUDGED.index(context)  # so that contexts do not share their noise


def rows_of(sets: Mapping[Context, Tensor]) -> Sampler:
    """Rows that a method is trained on, in place of samples."""

    def draw(context: Context, num: int, seed: int) -> Tensor:
        chosen = np.random.default_rng(seed).permutation(len(sets[context]))[:num]
        return sets[context][torch.from_numpy(chosen)]

    return draw


def distances(draw: Sampler, world: World, seed: int, contexts: Iterable[Context] = JUDGED) -> dict[str, float]:
    """Sliced Wasserstein distance of every judged context."""
    result = {}
    for context in contexts:
        samples = draw(context, NUM_SAMPLES, seed)
        reference = world.vectors(context, NUM_REFERENCE, 10**6 + _seed_of(context, seed))
        result[str(context)] = sliced_wasserstein(samples, reference)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=WORLDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--methods", nargs="+", choices=("floor", *METHODS), default=("floor", *METHODS))
    parser.add_argument("--base_world", choices=WORLDS, help="world of the base; by default the data's own")
    parser.add_argument("--mixing_seed", type=int, default=0, help="of the world; nothing was tuned on others than 0")
    parser.add_argument("--steps", type=int, default=1000, help="updates of every method")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base_steps", type=int, default=6000)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    named = ("steps", "batch_size", "base_steps", "base_world", "mixing_seed")
    settings = {name: getattr(arguments, name) for name in named}
    for seed in arguments.seeds:
        for world in (World(name, arguments.mixing_seed) for name in arguments.worlds):
            study = None
            for method in arguments.methods:
                done = arguments.output_dir / f"{world.name}-{seed}-{method.replace(', ', '-').replace(' ', '_')}.json"
                if done.exists():
                    if (before := json.loads(done.read_text())["settings"]) != settings:
                        raise SystemExit(f"{done} was made with {before}, not {settings}. Choose another --output_dir.")
                    continue
                study = study or make_study(world, seed, arguments)
                start = time.perf_counter()
                samplers = METHODS[method](study) if method != "floor" else {"floor": truth(world)}
                trained = time.perf_counter()
                results = {name: distances(draw, world, seed) for name, draw in samplers.items()}
                seconds = {"train": trained - start, "sample": time.perf_counter() - trained}
                content: dict[str, Any] = {"settings": settings, "results": results, "seconds": seconds}
                if "reweighted" in method:
                    ideal = method.endswith("by the truth")
                    drawn = study.reweighted_by_truth if ideal else study.reweighted
                    content["drawn"] = {str(d.context): [d.effective_sample_size, d.mass] for d in drawn}
                    sets = study.with_combinations(drawn)
                    pairs = [context for context in PAIRS if context in sets]
                    content["rows"] = distances(rows_of(sets), world, seed, pairs)
                done.write_text(json.dumps(content, indent=1) + "\n")
                means = {name: sum(r[str(p)] for p in PAIRS) / len(PAIRS) for name, r in results.items()}
                print(world.name, seed, {name: round(mean, 4) for name, mean in means.items()}, seconds, flush=True)
    write_tables(arguments.output_dir)


if __name__ == "__main__":
    main()
