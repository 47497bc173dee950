"""The main job on handwritten digits, in minutes on a CPU: train, compose, score, save, reload.

The base is a small pretrained diffusion model that ships with the package (`examples/pretrain.py` made it), the
data is the digit world, where the truth of every combination is known.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ._files import ARGUMENTS, RESULTS, RESULTS_IMAGE, checkpoint_steps
from ._markdown import table
from .bases.images import image_grid, side_by_side
from .bases.loading import as_base, load_base
from .contexts import Context
from .data import InterventionalData, from_dataset
from .data.worlds.digits import CONCEPTS, Split, read_attributes, sample_digits
from .errors import UserValueError
from .evaluation.metrics import sliced_wasserstein
from .hub.card import write_card
from .inference.merging import merge
from .inference.pipelines import load_context_adapter
from .inference.sampling import generate
from .messages.progress import ProgressBar, say
from .training.arguments import TrainingArguments
from .training.finetune import train

BASE = Path(str(files("hf_causal_context") / "models" / "digit_base"))
PEERS = Path(str(files("hf_causal_context") / "models" / "digit_peers.json"))
SINGLES = tuple(Context(name) for name in CONCEPTS)
PAIRS = tuple(a | b for a, b in combinations(SINGLES, 2))
CONTEXTS = (Context(), *SINGLES, *PAIRS)
LABELS = tuple(f"do({', '.join(context.targets)})" if context else "observational" for context in CONTEXTS)

Draw = Callable[[int, Context, int], NDArray[np.uint8]]  # number, context, seed -> images (N, H, W)

ROWS_PER_CONTEXT = 1500
NUM_SAMPLES = 128
NUM_INFERENCE_STEPS = 10
BATCH_SIZE = 64  # of samples
# With `fast`; in fewer rows there are too few that look like thick and pale strokes.
FAST_ROWS, FAST_STEPS, FAST_SAMPLES = 750, 50, 32
DATA_IMAGE = "data.png"
# Every Linear and convolution of the blocks: strokes are the convolutions' work, and the base has little attention.
_CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv_out")
TARGET_MODULES = (*_CONVOLUTIONS, "time_emb_proj", "to_q", "to_k", "to_v", "to_out.0")


def training_arguments(output_dir: Path, seed: int) -> TrainingArguments:
    """Return the quickstart's settings."""
    return TrainingArguments(
        pretrained_model_name_or_path=str(BASE),
        output_dir=str(output_dir),
        target_modules=list(TARGET_MODULES),
        concept_rank=4,
        observational_rank=0,  # the base was trained on the observational set
        reweighted_contexts=["pairs"],
        context_weights=["obs=0"],  # where this adapter is the base, and learns nothing
        train_batch_size=28,
        max_train_steps=200,
        learning_rate=3e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=10,
        use_ema=True,
        ema_decay=0.98,
        checkpointing_steps=100,
        checkpoints_total_limit=1,
        num_validation_images=0,
        resume_from_checkpoint="latest",  # so that the same command goes on after an interruption
        seed=seed,
    )


def digit_data(
    rows_per_context: int = ROWS_PER_CONTEXT,
    seed: int = 0,
    *,
    contexts: Sequence[Context] = (Context(), *SINGLES),
    training_contexts: Sequence[Context] | None = None,
    split: Split = "train",
) -> InterventionalData:
    """Sets of the digit world as a `datasets` table, by default those that the quickstart trains on."""

    def draw(num: int, context: Context, seed: int) -> NDArray[np.uint8]:
        return sample_digits(num, context, seed, split)[0]

    return drawn_data(draw, CONCEPTS, contexts, rows_per_context, seed, training_contexts)


def drawn_data(
    draw: Draw,
    concepts: Sequence[str],
    contexts: Sequence[Context],
    rows_per_context: int,
    seed: int,
    training_contexts: Sequence[Context] | None,
) -> InterventionalData:
    """Sets of a world that draws gray images, as a `datasets` table."""
    images: list[Image.Image] = []
    names: list[str] = []
    for number, context in enumerate(contexts):
        images += [Image.fromarray(image) for image in draw(rows_per_context, context, 100 * seed + number)]
        names += [str(context)] * rows_per_context
    features = Features({"image": ImageFeature(), "context": Value("string")})
    dataset = Dataset.from_dict({"image": images, "context": names}, features=features)
    return from_dataset(dataset, concepts=concepts, training_contexts=training_contexts)


@cache
def reference_images(context: Context, num: int) -> np.ndarray[Any, Any]:
    """Return the truth of a context: images (num, 32, 32), uint8, of glyphs that training never saw."""
    return sample_digits(num, context, seed=9000, split="test")[0]


def score(samples: Mapping[Context, Tensor]) -> dict[Context, float]:
    """Sliced Wasserstein distance of samples (N, 1, 32, 32) in [0, 1] from the truth of their contexts."""
    return {
        context: sliced_wasserstein(images, torch.from_numpy(reference_images(context, 4 * NUM_SAMPLES))[:, None] / 255)
        for context, images in samples.items()
    }


def sample(adapter: Path, contexts: Sequence[Context], num: int) -> dict[Context, Tensor]:
    """Images (num, 1, 32, 32) in [0, 1] of every context, from the same noise.

    A context is put into the base's weights first, and DPM-Solver++ (Lu et al., 2022) takes fewer steps than the
    base's own DDIM: half the work, at the same distances.
    """
    pipe: Any = load_base(str(BASE)).pipe
    load_context_adapter(pipe, adapter)
    images = {}
    for context in ProgressBar(contexts, desc="sample", unit="context"):
        scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        base = as_base(DDPMPipeline(copy.deepcopy(pipe.unet), cast(Any, scheduler)))
        merge(base, context)
        (images[context],) = generate(
            base, [()], seeds=range(num), num_inference_steps=NUM_INFERENCE_STEPS, batch_size=BATCH_SIZE
        )
    return images


def choose_threads() -> None:
    """Let torch compute with one thread, if that is faster now than with all: other programs may keep the cores busy.

    Threads wait for each other by spinning. Where one of them has no core, that takes several times the work's time.
    """
    denoiser = load_base(str(BASE)).denoiser
    batch = torch.zeros(BATCH_SIZE, 1, 32, 32)
    threads = torch.get_num_threads()
    seconds = dict.fromkeys((threads, 1), float("inf"))
    for number in (*seconds, *seconds):  # in turns, of which the first warms up
        torch.set_num_threads(number)
        start = time.perf_counter()
        with torch.no_grad():
            denoiser(batch, 0)
        seconds[number] = min(seconds[number], time.perf_counter() - start)
    fastest = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(fastest)
    if fastest < threads:
        times = seconds[threads] / seconds[fastest]
        say(f"The cores are busy: computing with one thread, now {times:.1f} times as fast as {threads} threads.")


def quickstart(output_dir: Path, seed: int = 0, *, fast: bool = False) -> None:
    """Train on single interventions, score the pairs, of which there is no data, save, reload.

    Args:
        output_dir: for the adapter and its images.
        seed: of the data and the training.
        fast: with less of everything.

    Raises:
        ValueError: for a folder with a run that is `fast` where this one is not, or the other way round.
        TrainingInterrupted, CheckpointError: see `train`; the same call goes on from the last checkpoint.
        RuntimeError: if the reloaded adapter gives other images.
    """
    start = time.perf_counter()
    settings, rows, num = training_arguments(output_dir, seed), ROWS_PER_CONTEXT, NUM_SAMPLES
    if fast:
        settings, rows, num = replace(settings, max_train_steps=FAST_STEPS), FAST_ROWS, FAST_SAMPLES
    _check_same_size(settings)
    say(f"Base: a small diffusion model of handwritten digits. Concepts: {', '.join(CONCEPTS)}")
    output_dir.mkdir(parents=True, exist_ok=True)
    image_grid(real_images(), LABELS).save(output_dir / DATA_IMAGE)
    say(
        f"{output_dir / DATA_IMAGE} shows what there is to learn: the first {1 + len(SINGLES)} rows are the data, the "
        "others combinations that the training does not see."
    )
    base = load_base(str(BASE))
    train(settings, base, digit_data(rows, seed))
    trained = time.perf_counter()
    say(f"\nTrained in {trained - start:.0f} s. Sampling {len(CONTEXTS)} contexts ...")
    samples = sample(output_dir, CONTEXTS, num)
    results = results_table(samples)
    print("\n" + results, flush=True)
    draw(samples).save(output_dir / RESULTS_IMAGE)
    (output_dir / RESULTS).write_text(results + "\n")
    write_card(output_dir)
    again = load_base(str(BASE))
    load_context_adapter(again.pipe, output_dir)
    both = [generate(each, PAIRS[:1], seeds=range(4), num_inference_steps=2)[0] for each in (base, again)]
    if not torch.equal(*both):
        raise RuntimeError(f"The adapter reloaded from {output_dir} gives other images than the trained one.")
    say("Reloaded with load_context_adapter: identical images.")
    seconds = time.perf_counter() - start
    print(f"Adapter, card and images are in {output_dir}/ (look at {RESULTS_IMAGE}). {seconds:.0f} s.")


def _check_same_size(settings: TrainingArguments) -> None:
    """Refuse to go on with a run of another length: it had other data, which a resumed run does not look at."""
    folder = Path(settings.output_dir)
    if not checkpoint_steps(folder):
        return
    steps = json.loads((folder / ARGUMENTS).read_text())["max_train_steps"]
    if steps != settings.max_train_steps:
        raise UserValueError(
            f"{folder} holds a run of {steps} steps, and this one would have {settings.max_train_steps}, on other "
            "data: with --fast it is another. Choose another --output_dir, or remove the folder."
        )


def results_table(samples: Mapping[Context, Tensor]) -> str:
    """Markdown: distances beside the floor, the base and the stacked LoRAs; then attributes read from the images."""
    peers, num = json.loads(PEERS.read_text()), len(samples[Context()])
    columns = {
        "real against real": score(
            {c: torch.from_numpy(sample_digits(num, c, seed=77)[0])[:, None] / 255 for c in samples}
        ),
        "base": score(dict.fromkeys(samples, samples[Context()])),  # the empty context is the base
        "stacked LoRAs": {Context.parse(name): distance for name, distance in peers["stacked_loras"].items()},
        "this adapter": score(samples),
    }
    if num < NUM_SAMPLES:
        del columns["stacked LoRAs"]  # fewer samples are farther from any truth
    distances = [
        (
            str(context) or "(observational)",
            "yes" if len(context.targets) < 2 else "none",
            *(f"{column[context]:.4f}" if context in column else "" for column in columns.values()),
        )
        for context in samples
    ]
    means = (f"{np.mean([column[pair] for pair in PAIRS]):.4f}" for column in columns.values())
    distances.append(("**mean of the pairs**", "none", *means))
    attributes = []
    for context, images in samples.items():
        real = np.nanmean(read_attributes(reference_images(context, 4 * NUM_SAMPLES)), axis=0)
        read = np.nanmean(read_attributes((255 * images[:, 0]).round().byte().numpy()), axis=0)
        cells = (f"{a:.2f} / {b:.2f}" for a, b in zip(real, read, strict=True))
        attributes.append((str(context) or "(observational)", *cells))
    of_peers = [f"Stacked LoRAs: measured beforehand by `{peers['command']}`.", ""] if num >= NUM_SAMPLES else []
    return "\n".join(
        [
            "Sliced Wasserstein distance to real images of unseen glyphs (lower is better):",
            "",
            *table(("context", "data", *columns), distances),
            "",
            *of_peers,
            "Attributes read from the images, real / this adapter:",
            "",
            *table(("context", "thickness (px)", "darkness (0-1)", "slant", "size (px)"), attributes),
        ]
    )


def real_images(columns: int = 8) -> list[Tensor]:
    """Return the world's own images (columns, 1, 32, 32) of every context."""
    return [torch.from_numpy(sample_digits(columns, context, seed=5)[0])[:, None] / 255 for context in CONTEXTS]


def draw(samples: Mapping[Context, Tensor]) -> Image.Image:
    """Return a grid of all contexts: the world's own images on the left, the adapter's samples on the right."""
    real = real_images()
    titles = ("real images", "samples; there was no data of pairs")
    return side_by_side(real, [images[: len(real[0])] for images in samples.values()], LABELS, titles)
