"""Your own folders of images: one per context, as `hf-causal-context train` reads them.

    python -m examples.own_folder --output_dir my-adapter

    pictures/obs/*.png  pictures/thickness/*.png  pictures/slant/*.png    trained
    pictures/slant+thickness/*.png     held out: a row of the sample grids, never trained

Here the images are drawn first (digits), so that the example runs as it stands. The same on the command line:

    hf-causal-context check-data --train_data_dir images
    hf-causal-context train --pretrained_model_name_or_path BASE --train_data_dir images --output_dir my-adapter
    hf-causal-context generate --adapter my-adapter --contexts obs slant+thickness thickness=0.5 --output_dir samples
"""

import argparse
from pathlib import Path

from PIL import Image

from hf_causal_context.bases.images import image_grid
from hf_causal_context.data import check_data, load_folders
from hf_causal_context.data.worlds.digits import sample_digits
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.sampling import generate
from hf_causal_context.quickstart import BASE, TARGET_MODULES
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train


def draw_images(root: Path, per_context: int) -> None:
    for seed, name in enumerate(("obs", "thickness", "slant", "slant+thickness")):
        (root / name).mkdir(parents=True, exist_ok=True)
        images, _, _ = sample_digits(per_context, () if name == "obs" else name, seed=seed)
        for number, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{number:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=100)
    arguments = parser.parse_args()
    images = arguments.output_dir / "images"
    draw_images(images, per_context=200)
    print(check_data(load_folders(images)).table())

    adapter = train(
        TrainingArguments(
            pretrained_model_name_or_path=str(BASE),
            train_data_dir=str(images),
            output_dir=str(arguments.output_dir / "adapter"),
            target_modules=list(TARGET_MODULES),
            train_batch_size=24,
            learning_rate=3e-3,
            max_train_steps=arguments.max_train_steps,
            num_inference_steps=10,
        )
    )
    contexts = ["obs", "thickness", "slant", "slant+thickness", "thickness=0.5"]
    base = StoredAdapter.open(adapter).pipeline()
    rows = generate(base, [() if name == "obs" else name for name in contexts], seeds=range(6), num_inference_steps=10)
    grid = arguments.output_dir / "grid.png"
    image_grid(rows, contexts).save(grid)
    print(f"Look at {grid} and at the grid of the training in {adapter / 'samples'}.")


if __name__ == "__main__":
    main()
