"""A stress test: digits in colors, where combinations are selected, not intervened on, and four fifths never occur.

    python -m examples.benchmarks.colored_mnist --mnist_dir FOLDER_WITH_IDX_FILES --output_dir colored-mnist

The partial support of Gaudi et al., "CoInD: Enabling Logical Compositions in Diffusion Models" (ICLR 2025): digit y
comes with the colors y and y + 1 only. Digits and colors are concepts, one per value (`digit3`, `color4`), so that
every row has a context of two. There is no observational set and no single intervention: the base is trained on all
rows without their labels, the methods on the rows with them; CoInD also sees rows with one label or both dropped, which
its objective asks for. *Conformity* is the share of samples in which classifiers, trained on all combinations, read the
digit and the color that were asked for.

To be quick on one core, the model is that of the vectors (`vector_flow.py`), and each channel of an image of 28 x 28
pixels stands there as its 40 coordinates in the principal directions of gray digits; samples become images again. The
same command goes on where it was stopped.

Shapes: N images, B samples, D = 120 coordinates, K = 20 concepts.
"""

import argparse
import colorsys
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_causal_context import ConceptSet, Context
from hf_causal_context._files import complete_or_absent
from hf_causal_context.bases.images import image_grid

from ..worlds.morphology import SIDE, Split, load_mnist
from .composition_methods import COIND_WEIGHT, Sampler, Sets, Study, context_adapter, multi_hot_lora
from .vector_flow import VectorFlow, optimize, train_base

DIRECTIONS = 40  # of each channel
READER_STEPS = 500
DIGITS, COLORS = (tuple(f"{kind}{value}" for value in range(10)) for kind in ("digit", "color"))
RGB = torch.tensor([colorsys.hsv_to_rgb(value / 10, 1, 1) for value in range(10)])
COMBINATIONS = tuple(Context(digit, color) for digit, color in product(DIGITS, COLORS))
SEEN = tuple(Context(DIGITS[y], COLORS[color % 10]) for y in range(10) for color in (y, y + 1))


def labels_of(context: Context) -> tuple[int, int]:
    """Digit and color of a combination."""
    return next((y, c) for y, c in product(range(10), repeat=2) if context == Context(DIGITS[y], COLORS[c]))


class ColoredDigits:
    """MNIST with colors, as coordinates (N, D) whose mean square over the training set is 1."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        gray, _ = self._gray("train")
        self._directions = torch.linalg.eigh(gray.T @ gray).eigenvectors[:, -DIRECTIONS:]  # (784, 40)
        shares = RGB.square().mean()
        self._scale = ((gray @ self._directions).square().mean() * shares).sqrt()

    def _gray(self, split: Split) -> tuple[Tensor, Tensor]:
        gray, digits = load_mnist(self._folder, split)
        return torch.from_numpy(gray).flatten(1) / 255, torch.from_numpy(digits)

    def sets(self, split: Split, full_support: bool, seed: int) -> dict[Context, Tensor]:
        """Every digit of a split once, in a random color: any, or one of its two."""
        gray, digits = self._gray(split)
        generator = torch.Generator().manual_seed(seed)
        colors = torch.randint(10 if full_support else 2, digits.shape, generator=generator)
        colors = colors if full_support else (digits + colors) % 10
        coordinates = gray @ self._directions / self._scale
        rows = (RGB[colors][:, :, None] * coordinates[:, None]).flatten(1)
        labels = {context: labels_of(context) for context in (COMBINATIONS if full_support else SEEN)}
        return {context: rows[(digits == y) & (colors == color)] for context, (y, color) in labels.items()}

    def images(self, rows: Tensor) -> Tensor:
        """Images (N, 3, 28, 28) in [0, 1] of coordinates."""
        pixels = rows.unflatten(1, (3, DIRECTIONS)) * self._scale @ self._directions.T
        return pixels.clamp(0, 1).unflatten(2, (SIDE, SIDE))


def with_dropped_labels(sets: Sets) -> Sets:
    """The sets, their unions by digit and by color, and the union of all."""
    unions = {Context(): torch.cat(list(sets.values()))}
    for name in (*DIGITS, *COLORS):
        unions[Context(name)] = torch.cat([rows for context, rows in sets.items() if name in context.targets])
    return {**unions, **sets}


class Reader(nn.Module):
    """Logits of the digit and of the color (B, 2, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * DIRECTIONS, 256), nn.GELU(), nn.Dropout(0.2), nn.Linear(256, 20))

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows).unflatten(1, (2, 10))


def train_reader(reader: Reader, sets: Sets) -> None:
    """Learn both labels from all combinations."""
    rows = torch.cat(list(sets.values()))
    labels = torch.tensor([labels_of(context) for context, own in sets.items() for _ in range(len(own))])
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        chosen = torch.randint(len(rows), (256,), generator=generator)
        return F.cross_entropy(reader(rows[chosen]).flatten(0, 1), labels[chosen].flatten())

    optimize(reader.parameters(), loss, READER_STEPS, 2e-3, "classifiers")


def keep(module: nn.Module, path: Path, train: Callable[[], None]) -> None:
    """Load the weights of a module, or train it and save them."""
    if path.exists():
        module.load_state_dict(load_file(path))
    else:
        train()
        with complete_or_absent(path) as unfinished:
            save_file(module.state_dict(), unfinished)
    module.requires_grad_(False).eval()


# name of a result -> what trains it; the base was trained on these very rows, so there is no observational part.
METHODS: dict[str, Callable[[Study], Sampler]] = {
    "base": lambda study: lambda context, num, seed: study.sample(study.base, num, seed),
    "multi-hot LoRA": lambda study: multi_hot_lora(study, study.sets),
    "CoInD": lambda study: multi_hot_lora(study, with_dropped_labels(study.sets), coind=COIND_WEIGHT),
    "this adapter": lambda study: context_adapter(study, study.sets, observational_rank=0),
    "oracle": lambda study: context_adapter(study, study.oracle_sets, observational_rank=0),
}


def conformity(reader: Reader, rows: Sets) -> dict[str, float]:
    """Shares with the digit, with the color and with both, in combinations that training has and has not."""
    right = {context: reader(own).argmax(2) == torch.tensor(labels_of(context)) for context, own in rows.items()}
    shares = {}
    for name, contexts in (("seen", SEEN), ("unseen", [c for c in COMBINATIONS if c not in SEEN])):
        both_labels = torch.cat([right[context] for context in contexts])
        for label, hits in (("", both_labels.all(1)), (": digit", both_labels[:, 0]), (": color", both_labels[:, 1])):
            shares[name + label] = float(hits.float().mean())
    return shares


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown with a row for each method."""
    columns = ["method", *next(iter(results.values()))]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{v:.3f}" for v in row.values()) + " |" for name, row in results.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--base_steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300, help="updates of every method")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--samples_per_combination", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(arguments).items() if isinstance(value, int)}
    results_file = folder / "results.json"
    content = json.loads(results_file.read_text()) if results_file.exists() else {"settings": settings, "results": {}}
    if content["settings"] != settings:
        before = content["settings"]
        raise SystemExit(f"{results_file} was made with {before}, not {settings}. Choose another --output_dir.")
    results: dict[str, dict[str, float]] = content["results"]

    def save() -> None:
        with complete_or_absent(results_file) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1) + "\n")

    save()  # the settings, before anything is made with them
    torch.manual_seed(arguments.seed)
    data = ColoredDigits(arguments.mnist_dir)
    seen, everything = (data.sets("train", full_support, arguments.seed) for full_support in (False, True))
    reader = Reader()
    keep(reader, folder / "classifiers.safetensors", lambda: train_reader(reader, everything))
    base = VectorFlow(dimension=3 * DIRECTIONS)
    rows = torch.cat(list(seen.values()))
    keep(base, folder / "base.safetensors", lambda: train_base(base, rows, arguments.base_steps))
    size = (arguments.seed, arguments.steps, arguments.batch_size)
    study = Study(base, ConceptSet((*DIGITS, *COLORS)), seen, everything, COMBINATIONS, {}, *size)

    results.setdefault("real images", conformity(reader, data.sets("test", True, arguments.seed)))
    for name, train in METHODS.items():
        if name in results:
            continue
        start = time.process_time()
        draw = train(study)
        num = arguments.samples_per_combination
        samples = {context: draw(context, num, number) for number, context in enumerate(COMBINATIONS)}
        results[name] = conformity(reader, samples)
        print(f"{name}: {time.process_time() - start:.0f} s of one core", flush=True)
        first = data.images(torch.stack([samples[context][0] for context in COMBINATIONS])).unflatten(0, (10, 10))
        image_grid(list(first), DIGITS).save(folder / f"{name.replace(' ', '-')}.png")  # a column for each color
        save()
    print(table(results))


if __name__ == "__main__":
    main()
