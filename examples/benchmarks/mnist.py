"""One training on MNIST: thickness, slant and size as interventions on real digits, scored on pairs never trained.

    python -m examples.benchmarks.mnist --mnist_dir FOLDER_WITH_IDX_FILES --output_dir mnist-context

The base is the quickstart's, fine-tuned on the observational digits first (all weights, no concepts); then it is frozen
and an adapter is trained by the package's trainer. Scores: sliced Wasserstein distance to digits that no training saw.
"""

import argparse
import gzip
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from skimage.morphology import dilation, disk
from skimage.transform import AffineTransform, warp
from tqdm import tqdm

from hf_causal_context import Context
from hf_causal_context.bases.images import image_grid
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data import from_dataset
from hf_causal_context.evaluation.metrics import sliced_wasserstein
from hf_causal_context.inference.sampling import generate
from hf_causal_context.quickstart import BASE, TARGET_MODULES
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train

CONCEPTS = ("thick", "slant", "small")
CONTEXTS = [Context(), *map(Context, CONCEPTS), *(Context(*pair) for pair in combinations(CONCEPTS, 2))]


def read_mnist(folder: Path) -> np.ndarray:
    (path,) = list(folder.glob("*images-idx3-ubyte.gz"))[:1]
    with gzip.open(path) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


def intervene_on(image: np.ndarray, context: Context, rng: np.random.Generator) -> np.ndarray:
    """Thicken, shear and shrink one image (32, 32), uint8."""
    if "thick" in context.targets:
        image = dilation(image, disk(1))
    shear = rng.normal(0.5, 0.05) if "slant" in context.targets else 0.0
    zoom = 1 / rng.normal(0.7, 0.03) if "small" in context.targets else 1.0
    matrix = np.array([[zoom, zoom * shear, 0], [0, zoom, 0], [0, 0, 1]])
    matrix[:2, 2] = 15.5 - matrix[:2, :2] @ [15.5, 15.5]
    return np.rint(warp(image, AffineTransform(matrix), order=1, preserve_range=True)).astype(np.uint8)


def pretrain(images: np.ndarray, steps: int, folder: Path) -> None:
    base = load_base(str(BASE))
    unet = base.denoiser.train()
    scheduler: Any = base.noise_scheduler()
    clean_images = torch.tensor(images)[:, None].float() / 127.5 - 1
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="base"):
        clean = clean_images[torch.randint(len(clean_images), (64,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (64,))
        loss = unet(scheduler.add_noise(clean, noise, t), t).sample - scheduler.get_velocity(clean, noise, t)
        optimizer.zero_grad()
        loss.square().mean().backward()
        optimizer.step()
        schedule.step()
    base.pipe.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mnist_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pretraining_steps", type=int, default=500)
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--num_samples", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    digits = rng.permutation(read_mnist(arguments.mnist_dir))
    held_out, training = digits[:2000], digits[2000:]
    base_folder = arguments.output_dir / "base"
    if not base_folder.exists():
        pretrain(training, arguments.pretraining_steps, base_folder)

    # Every context gets digits of its own: sets, not pairs.
    parts = np.array_split(training, 1 + len(CONCEPTS))
    drawn = [(c, intervene_on(p, c, rng)) for c, part in zip(CONTEXTS[:4], parts, strict=True) for p in part]
    columns = {"image": [Image.fromarray(p) for _, p in drawn], "context": [str(c) for c, _ in drawn]}
    features = Features({"image": ImageFeature(), "context": Value("string")})
    data = from_dataset(Dataset.from_dict(columns, features=features), concepts=CONCEPTS)
    adapter = arguments.output_dir / "adapter"
    settings = TrainingArguments(
        pretrained_model_name_or_path=str(base_folder), output_dir=str(adapter), target_modules=list(TARGET_MODULES),
        train_batch_size=40, max_train_steps=arguments.max_train_steps, learning_rate=3e-3, lr_scheduler="cosine",
        lr_warmup_steps=10, use_ema=True, ema_decay=0.98, num_validation_images=0, seed=arguments.seed,
    )  # fmt: skip
    base = load_base(str(base_folder))
    train(settings, base=base, data=data)

    rows = generate(base, CONTEXTS, seeds=range(arguments.num_samples), num_inference_steps=15, batch_size=64)
    image_grid([row[:10] for row in rows], [str(c) or "obs" for c in CONTEXTS]).save(adapter / "grid.png")
    scores = {}
    print("| context | trained | real against real | base | this adapter |\n|---|---|---|---|---|")
    for context, row in zip(CONTEXTS, rows, strict=True):
        truth, floor = (
            torch.tensor(np.stack([intervene_on(p, context, rng) for p in some]))[:, None] / 255
            for some in (held_out, training[: arguments.num_samples])
        )
        values = [sliced_wasserstein(x, truth) for x in (floor, rows[0], row)]
        scores[str(context)] = values
        trained = "yes" if len(context.targets) < 2 else "never"
        print(f"| {str(context) or '(observational)'} | {trained} | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    (adapter / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
