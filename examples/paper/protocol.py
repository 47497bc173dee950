"""The paper's experiments: how its methods are trained and measured, whatever the world.

Metrics: sliced Wasserstein distance to held-out images in [0, 1], 50 projections, mean over contexts; for concept
learning the trained contexts, for composition the held-out ones. "distinct" takes 1,280 different samples. "published"
takes what the published evaluation did, which drew the same noise for every batch: 64 samples, repeated 20 times.
Attributes read back from the pixels have a distance of their own each, since images hardly change with some of them.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_causal_context import ConceptSet, Context
from hf_causal_context.evaluation.metrics import sliced_wasserstein
from hf_causal_context.messages.progress import ProgressBar
from hf_causal_context.models.context_autoencoder import ContextAutoencoder
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments
from hf_causal_context.training.autoencoder.images import ImageSet, to_floats
from hf_causal_context.training.autoencoder.objective import AutoencoderObjective, bits_per_dimension
from hf_causal_context.training.autoencoder.train import mean_loss, train_autoencoder
from hf_causal_context.training.loop.checkpoints import write_file

from .baselines import BASELINES

NUM_SAMPLES, BATCH = 1280, 64
PROJECTIONS = 50

# Ablations, methods and baselines of the paper; those with a mode start from "base pooled" of the same seed.
METHODS: dict[str, dict[str, Any]] = {
    "base": {"without_context_module": True},
    "base pooled": {"without_context_module": True},
    "CM pooled": {"ignore_contexts": True},
    "CM end-to-end": {},
    "CM frozen": {"mode": "frozen"},
    "CM fine-tune": {"mode": "fine-tune"},
    **{name: {"without_context_module": True} for name in BASELINES},
}


@dataclass(frozen=True)
class World:
    """Images in contexts.

    `training()` are rows to train and validate on; `real(context, num, seed)` are others, (num, C, S, S) bytes, all
    different.

    `attributes`, where they can be read back: images (n, C, S, S), bytes -> name -> (n, A).
    """

    name: str
    concepts: ConceptSet
    trained: tuple[Context, ...]
    held_out: tuple[Context, ...]
    training: Callable[[], ImageSet]
    real: Callable[[Context, int, int], Tensor]
    attributes: Callable[[Tensor], Mapping[str, NDArray[np.floating]]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def judged(self) -> tuple[Context, ...]:
        """All contexts that samples are compared in."""
        return (*self.trained, *self.held_out)


def run(world: World, method: str, seed: int, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Train one method with one seed and measure it; what is done already is read from `folder`."""
    name = method.replace(" ", "-")
    run_folder = folder / f"{name}-{seed}"
    settings = world.settings | METHODS[method.partition(",")[0]] | changes
    if any(settings.get(name) for name in ("published", "without_context_module", "ignore_contexts")):
        settings.pop("mean_penalty", None)  # a world's is for our own context module; these have none by default
    if settings.get("mode") in ("frozen", "fine-tune"):
        settings["base"] = str(folder / f"base-pooled-{seed}")
        settings.pop("architecture", None)  # it is the base's
    results, begun = run_folder / "results.json", run_folder / "begun.json"
    made_by = {"world": world.name, "settings": json.loads(json.dumps(settings))}
    # A run that was interrupted goes on, so it must be the same one, too.
    for record in filter(Path.exists, (results, begun)):
        done = json.loads(record.read_text())
        if before := {name: done[name] for name in made_by if done[name] != made_by[name]}:
            raise SystemExit(f"{record} was made with {before}, not {made_by}. Change --output_dir.")
        if record == results:
            return done
    everything = world.training()
    images = everything.select(np.flatnonzero(everything.contexts == "")) if method == "base" else everything
    arguments = AutoencoderArguments(
        output_dir=str(run_folder),
        seed=seed,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        compile=torch.cuda.is_available(),
        **settings,
    )
    if arguments.max_train_steps is None:
        arguments = watched(arguments, len(images.contexts))
    run_folder.mkdir(parents=True, exist_ok=True)
    write(begun, json.dumps(made_by, indent=1))
    begin = time.perf_counter()
    train_autoencoder(arguments, images, objective_class=BASELINES.get(method, AutoencoderObjective))
    seconds = time.perf_counter() - begin
    model = ContextAutoencoder.from_pretrained(run_folder).eval()
    model = cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    # Of all contexts, whatever the method was trained on.
    _, validation = everything.split(arguments.validation_fraction, seed)
    loss = sum(mean_loss(AutoencoderObjective(model), model, validation))
    content = {
        **made_by,
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "reconstruction": bits_per_dimension(loss, model.backbone),
        **measure(world, lambda context, s: model.sample(context, NUM_SAMPLES, torch.Generator().manual_seed(s)), seed),
    }
    write(results, json.dumps(content, indent=1))
    return content


def watched(arguments: AutoencoderArguments, rows: int) -> AutoencoderArguments:
    """Validation and early stopping as published, for runs that are counted in epochs."""
    epoch = arguments.steps_per_epoch(round((1 - arguments.validation_fraction) * rows))
    return replace(arguments, validation_steps=epoch, early_stopping_patience=20, checkpointing_steps=10 * epoch)


def floor(world: World, seed: int, folder: Path) -> dict[str, Any]:
    """Real images in place of samples: those that follow the ones they are compared with."""
    path = folder / f"floor-{seed}.json"
    made_by = {"world": world.name, "settings": json.loads(json.dumps(world.settings))}
    if path.exists() and made_by.items() <= (done := json.loads(path.read_text())).items():
        return done
    path.parent.mkdir(parents=True, exist_ok=True)
    content = made_by | measure(
        world, lambda context, s: to_floats(world.real(context, 2 * NUM_SAMPLES, s)[NUM_SAMPLES:]), seed
    )
    write(path, json.dumps(content, indent=1))
    return content


def write(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    write_file(path, path.parent, lambda unfinished: unfinished.write_text(text + "\n"))


def at_most(rows: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """The first `num` held-out rows.

    Raises:
        SystemExit: for fewer rows.
    """
    if len(rows) < num:
        raise SystemExit(f"A context has {len(rows)} held-out images; distance and floor need {num} different ones.")
    return rows[:num]


def measure(world: World, draw: Callable[[Context, int], Tensor], seed: int) -> dict[str, dict[str, Any]]:
    """Distances of samples from real images: metric -> context -> number; "attributes" -> name -> context -> number."""
    distinct, published = {}, {}
    attributes: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for number, context in enumerate(ProgressBar(world.judged, desc="measure", unit="context")):
        own = 1000 * seed + 10 * number  # so that contexts do not share their noise
        real = world.real(context, NUM_SAMPLES, own)
        samples = draw(context, own).cpu()
        name = str(context)
        distinct[name] = distance(samples, to_floats(real))
        published[name] = distance(repeated(samples), to_floats(real))
        if world.attributes is not None:
            drawn, true = (world.attributes(images) for images in ((samples * 255).round().byte(), real))
            for attribute, values in drawn.items():
                attributes[attribute][name] = distance(torch.from_numpy(values), torch.from_numpy(true[attribute]))
    return {"distinct": distinct, "published": published, "attributes": dict(attributes)}


def distance(samples: Tensor, real: Tensor) -> float:
    """Sliced Wasserstein distance with the paper's number of projections."""
    return sliced_wasserstein(samples, real, num_projections=PROJECTIONS)


def repeated(samples: Tensor) -> Tensor:
    """The first 64 samples 20 times, as the published evaluation had them."""
    return samples[:BATCH].repeat(NUM_SAMPLES // BATCH, *(1,) * (samples.ndim - 1))
