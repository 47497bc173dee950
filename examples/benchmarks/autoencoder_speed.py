"""Images per second of the autoencoder's training, beside a plain loop: items one by one, one context per batch.

    python -m examples.benchmarks.autoencoder_speed

Both train the same model on the same quad images, in float32, with 512 images per update. The plain loop is what
one writes first: a Dataset that turns one image after the other into floats, a DataLoader, batches of 64 with one
context, eight of them accumulated, a masked dense matrix for every block-linear layer, sigmoid and cross-entropy, Adam.
Ours keeps bytes in memory, mixes contexts and applies blocks at once. The loops alternate; the table has their medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hf_causal_context import ConceptSet, Context
from hf_causal_context.context_module import BlockLinear
from hf_causal_context.models import ContextAutoencoder
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments
from hf_causal_context.training.autoencoder.images import ImageBatches, ImageSet
from hf_causal_context.training.autoencoder.objective import AutoencoderObjective

from ..worlds.quad import CONCEPTS, sample_quad

PER_UPDATE, MICRO_BATCH = 512, 64


class Items(Dataset):
    """One context's images as floats, one by one."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        return torch.from_numpy(self.images[number]).float() / 255


def plain_updates(arrays: dict[Context, np.ndarray], size: int) -> Iterator[None]:
    """One update of the plain loop per step."""
    torch.manual_seed(0)
    model = ContextAutoencoder(CONCEPTS, {"class": "LightweightVAE", "size": size}).train()
    for module in model.modules():
        if isinstance(module, BlockLinear):
            cast(Any, module).forward = masked_dense(module)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    concepts = ConceptSet(CONCEPTS)
    loaders = [
        (concepts.mask([context]), DataLoader(Items(array), MICRO_BATCH, shuffle=True, drop_last=True))
        for context, array in arrays.items()
    ]
    streams = [(mask, iter(loader)) for mask, loader in loaders]
    number = 0
    while True:
        optimizer.zero_grad()
        for _ in range(PER_UPDATE // MICRO_BATCH):
            place = number % len(streams)
            mask, stream = streams[place]
            images = next(stream, None)
            if images is None:
                streams[place] = (mask, iter(loaders[place][1]))
                images = next(streams[place][1])
            output, kl, _ = model(images, mask)
            error = nn.functional.binary_cross_entropy(output.sigmoid(), images, reduction="sum")
            loss = (error + kl.sum()) / PER_UPDATE
            loss.backward()
            loss.item()
            number += 1
        optimizer.step()
        yield


def masked_dense(layer: BlockLinear) -> Callable[[Tensor], Tensor]:
    """The layer as a product with a masked (K out, K in) matrix."""

    def forward(x_BKI: Tensor) -> Tensor:
        matrix = torch.block_diag(*layer.weight)
        return nn.functional.linear(x_BKI.flatten(1), matrix, layer.bias.flatten()).view(len(x_BKI), *layer.bias.shape)

    return forward


def our_updates(arrays: dict[Context, np.ndarray], size: int, batch_size: int, compiled: bool) -> Iterator[None]:
    """One update of our training step per step."""
    torch.manual_seed(0)
    model = ContextAutoencoder(CONCEPTS, {"class": "LightweightVAE", "size": size}).train()
    if compiled:
        for part in (*model.backbone.children(), model.context_module):
            part.compile()
    arguments = AutoencoderArguments(output_dir="unused", train_batch_size=batch_size)
    batches = ImageBatches(ImageSet.of_arrays(arrays, ConceptSet(CONCEPTS)), arguments, 10**6, torch.device("cpu"))(0)
    objective = AutoencoderObjective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    while True:
        optimizer.zero_grad()
        for _ in range(PER_UPDATE // batch_size):
            loss = objective(model, next(batches)).mean() * batch_size / PER_UPDATE
            loss.backward()
        optimizer.step()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--updates", type=int, default=1, help="timed together")
    parser.add_argument("--compile", action="store_true", help="also ours, compiled")
    given = parser.parse_args()
    contexts = (Context(), *map(Context, CONCEPTS))
    arrays = {context: sample_quad(1000, context, seed, size=given.size)[0] for seed, context in enumerate(contexts)}
    loops = {
        "plain": plain_updates(arrays, given.size),
        "ours, batches of 64": our_updates(arrays, given.size, 64, False),
        "ours, batches of 512": our_updates(arrays, given.size, 512, False),
    }
    if given.compile:
        loops["ours, batches of 64, compiled"] = our_updates(arrays, given.size, 64, True)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        next(loop)  # allocates, and compiles
    for _ in range(given.repeats):
        for name, loop in loops.items():
            begin = time.perf_counter()
            for _ in range(given.updates):
                next(loop)
            seconds[name].append((time.perf_counter() - begin) / given.updates)
    print(f"{given.size} x {given.size}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| loop | images per second | ratio |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(plain / own for plain, own in zip(seconds["plain"], values, strict=True))
        print(f"| {name} | {PER_UPDATE / statistics.median(values):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
