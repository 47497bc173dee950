"""The worlds that counterfactuals are compared in, and what is trained for it.

Both know the truth of every edit: the same sample, with the same noise in all that it is made of, in the context.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline
from numpy.typing import NDArray
from torch import Tensor

from hf_causal_context import ConceptSet, Context
from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.data.worlds import digits
from hf_causal_context.inference.pipelines import load_context_adapter
from hf_causal_context.models import ContextAutoencoder
from hf_causal_context.quickstart import BASE
from hf_causal_context.training.autoencoder import ImageSet, train_autoencoder
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments
from hf_causal_context.training.finetune import train

from ..pretrain import build, pretrain
from ..worlds import morpho_mnist
from ..worlds.morphology import load_mnist
from .image_composition_methods import Study
from .image_worlds import World, digit_world

MARGIN = 2  # of black around the digits of MNIST, so that their side can be halved

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (N, 32, 32) and the classes of their digits


@dataclasses.dataclass(frozen=True)
class Task:
    """A world, the images to edit, and their truth.

    Args:
        world: what methods train on.
        factual: images (N, 32, 32) without intervention, and their classes.
        truth: context -> what they would have been.
        labelled: number, context, seed -> real images that methods may train on.
        measure: images -> attributes (N, A).
        attributes: their names.
        effects: concept -> the attributes that it moves.
        reweighted: combinations that our adapter trains on reweighted rows of.
    """

    world: World
    factual: Labelled
    truth: Callable[[Context], NDArray[np.uint8]]
    labelled: Callable[[int, Context, int], Labelled]
    measure: Callable[[NDArray[np.uint8]], NDArray[np.floating[Any]]]
    attributes: tuple[str, ...]
    effects: dict[str, set[str]]
    reweighted: tuple[str, ...]

    def moved(self, context: Context) -> NDArray[np.bool_]:
        """Which attributes the context moves (A,)."""
        moved = set().union(*(self.effects[name] for name in context.targets))
        return np.array([name in moved for name in self.attributes])


def digit_task(num: int, seed: int) -> Task:
    """Digits of fonts; thickness moves darkness, too."""

    def real(context: Context) -> Labelled:
        images, classes, _ = digits.sample_digits(num, context, seed=1000 + seed, split="test")
        return images, classes

    effects = {name: {name} for name in digits.CONCEPTS} | {"thickness": {"thickness", "darkness"}}
    return Task(
        digit_world(),
        real(Context()),
        lambda context: real(context)[0],
        lambda n, context, s: digits.sample_digits(n, context, s)[:2],
        digits.read_attributes,
        digits.CONCEPTS,
        effects,
        ("pairs",),
    )


def morpho_task(num: int, seed: int, mnist_dir: Path, public_dir: Path) -> Task:
    """The published test images; what is trained on is rebuilt from MNIST's training digits."""
    public, originals, classes, *values = morpho_mnist.load_test(public_dir, mnist_dir)
    order = np.random.default_rng(seed).permutation(len(public))
    edited, others = order[:num], order[num:]
    thickness, intensity = (value[edited] for value in values)
    noise = morpho_mnist.noise(thickness, intensity)

    def truth(context: Context) -> NDArray[np.uint8]:
        return padded(morpho_mnist.draw(originals[edited], *morpho_mnist.under(context, thickness, noise)))

    def labelled(n: int, context: Context, s: int, test: bool = False) -> Labelled:
        rng = np.random.default_rng(s)
        images, labels = (originals[others], classes[others]) if test else load_mnist(mnist_dir)
        rows = rng.choice(len(images), n, replace=False)
        drawn = morpho_mnist.under(context, *morpho_mnist.sample_noise(n, rng))
        return padded(morpho_mnist.draw(images[rows], *drawn)), labels[rows]

    groups = {"singles": morpho_mnist.SINGLES, "pairs": morpho_mnist.PAIRS}
    world = World(
        morpho_mnist.CONCEPTS,
        groups,
        lambda n, context, s: labelled(n, context, s)[0],
        lambda context, n: labelled(n, context, 9000, test=True)[0],
    )
    effects = {name: {"thickness", "intensity"} for name in morpho_mnist.THICKNESS}
    effects |= {name: {"intensity"} for name in morpho_mnist.INTENSITY}
    return Task(
        world,
        (padded(public[edited]), classes[edited]),
        truth,
        labelled,
        lambda images: morpho_mnist.measure(images[:, MARGIN:-MARGIN, MARGIN:-MARGIN]),
        morpho_mnist.ATTRIBUTES,
        effects,
        (),  # thicknesses that are set to one value do not overlap with those of other rows
    )


def padded(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, 28, 28) -> (N, 32, 32)."""
    return np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))


def prepare_base(world: World, folder: Path, steps: int, num_images: int) -> Path:
    """Train the packaged base on images without intervention, unless it is there; it goes on where it was stopped."""
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        pipe: Any = build()
        pipe.unet.load_state_dict(DDIMPipeline.from_pretrained(BASE).unet.float().state_dict())
        folder.mkdir(parents=True, exist_ok=True)
        images = torch.from_numpy(world.draw(num_images, Context(), 1))[:, None]
        options = {"max_train_steps": steps, "train_batch_size": 24, "learning_rate": 7e-4, "device": "cpu"}
        pretrain(pipe, images, Namespace(output_dir=folder, **options))
    return folder


def adapted_base(study: Study, steps: int, reweighted: tuple[str, ...], paired: bool = False) -> DiffusionBase:
    """Return the base with our adapter, on pairs or not, which is trained once."""
    settings = study.settings("ours-paired" if paired else "ours", steps)
    folder = Path(settings.output_dir)
    if not (folder / "adapter_model.safetensors").exists():
        # The base was trained on the observational set.
        settings = dataclasses.replace(settings, observational_rank=0, reweighted_contexts=list(reweighted))
        train(settings, study.load_base(), study.paired_data if paired else study.data)
    base = study.load_base()
    load_context_adapter(base.pipe, folder).set_progress_bar_config(disable=True)
    return base


def trained_autoencoder(study: Study, steps: int) -> ContextAutoencoder:
    """Return the paper's autoencoder, trained once on the sets that the adapter trains on."""
    folder = study.folder / f"autoencoder-{steps}"
    if not (folder / "config.json").exists():
        arguments = AutoencoderArguments(
            output_dir=str(folder),
            seed=study.seed,
            resolution=32,
            channels=1,
            noise_width=16,
            concept_width=8,
            max_train_steps=steps,
            train_batch_size=64,
            lr_warmup_steps=steps // 10,
            validation_fraction=0.05,
            num_validation_images=0,
            checkpoints_total_limit=1,
            resume_from_checkpoint="latest",
        )
        rows: Any = study.data.rows.with_format("numpy")
        contexts, images = np.array(rows["context"][:]), np.stack(rows["image"][:])[:, None]
        sets = {context: images[contexts == str(context)] for context in study.world.trained}
        train_autoencoder(arguments, ImageSet.of_arrays(sets, ConceptSet(study.world.concepts)))
    return ContextAutoencoder.from_pretrained(folder).eval()


def floats(images: NDArray[np.uint8]) -> Tensor:
    """(N, 32, 32) -> (N, 1, 32, 32) in [0, 1]."""
    return torch.from_numpy(images)[:, None] / 255
