"""Small folders of images, and the settings of short runs on tiny pipelines."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from hf_causal_context.cli import main
from hf_causal_context.media.videos import save_video

CONTEXTS = ("obs", "slant", "thick")


def write_folders(root, contexts=CONTEXTS, images=4, size=16, captions=False):
    """One folder for each context, with images that all differ."""
    root = Path(root)
    generator = np.random.default_rng(0)
    for context in contexts:
        (root / context).mkdir(parents=True)
        for i in range(images):
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / context / f"{i}.png")
        if captions:
            lines = [json.dumps({"file_name": f"{i}.png", "text": f"a {context} {i % 2}"}) for i in range(images)]
            (root / context / "metadata.jsonl").write_text("\n".join(lines))
    return root


def write_clips(root, frames=5, clips=2, size=32, files=False, contexts=CONTEXTS):
    """One folder for each context, with clips that all differ: files, or folders of images."""
    generator = np.random.default_rng(0)
    for context in contexts:
        for i in range(clips):
            pixels = generator.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
            clip = Path(root, context, f"{i}.mp4" if files else str(i))
            (clip.parent if files else clip).mkdir(parents=True, exist_ok=True)
            if files:
                save_video([Image.fromarray(frame) for frame in pixels], clip, 16)
                continue
            for number, frame in enumerate(pixels):
                Image.fromarray(frame).save(clip / f"{number + 8}.png")
    return Path(root)


def settings(base, data, output_dir, **changes):
    """Keyword arguments of TrainingArguments for a short run without grids."""
    given = {
        "pretrained_model_name_or_path": str(base),
        "train_data_dir": str(data),
        "output_dir": str(output_dir),
        "train_batch_size": 3,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "num_validation_images": 0,
    }
    return given | changes


def adapter_weights(folder):
    return load_file(Path(folder, "adapter_model.safetensors"))


def assert_close_to_largest(actual, expected, tolerance=1e-5):
    """Tensors by name agree within `tolerance` times the largest number of all."""
    assert actual.keys() == expected.keys()
    largest = max(tensor.abs().max() for tensor in expected.values())
    assert largest > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=float(tolerance * largest), msg=name)


def check_commands(adapter, base, folder, options, sampling):
    """`generate` and `export` take the options of a base, and diffusers loads what is exported."""
    options = ["--adapter", str(adapter), *options]
    made = ["--seeds", "0", "--output_dir", str(folder / "made")]
    assert main(["generate", *options, "--contexts", "obs", "thick", *sampling, *made]) == 0
    assert len(list((folder / "made").iterdir())) == 2
    for file_format in ("peft", "diffusers"):
        written = ["--output_dir", str(folder / file_format)]
        assert main(["export", *options, "--context", "singles", "--format", file_format, *written]) == 0
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(str(next((folder / "diffusers").rglob("*thick*.safetensors"))))
