"""A text-to-image base: the same trainer on Stable Diffusion, with captions and cached latents.

    python -m examples.text_to_image --output_dir sd-adapter
    python -m examples.text_to_image --output_dir sd-adapter --base stable-diffusion-v1-5/stable-diffusion-v1-5

Without --base it builds a tiny Stable Diffusion with random weights, so that it runs offline in seconds: the images
are noise then, the steps are the real ones. SDXL, SD3, Flux and PixArt bases work the same way.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train


def tiny_stable_diffusion(folder: Path) -> None:
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, **sizes))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    blocks: dict[str, Any] = {"block_out_channels": (16, 16), "norm_num_groups": 8}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts |= {"vae": AutoencoderKL(**blocks), "text_encoder": text, "tokenizer": tokenizer, "unet": unet}
    parts["scheduler"] = DDIMScheduler(steps_offset=1, clip_sample=False)
    StableDiffusionPipeline(**parts).save_pretrained(folder)


def draw_images(root: Path) -> None:
    """Squares that are red or large, each with a caption (the `text` of metadata.jsonl)."""
    for name in ("obs", "red", "large"):
        (root / name).mkdir(parents=True, exist_ok=True)
        captions = []
        for i in range(60):
            side = 10 if name == "large" else 3 + i % 3
            image = Image.new("RGB", (16, 16), (i, 4 * i, 255 - i))
            image.paste((200 + i % 50, 20, 20) if name == "red" else (20, 4 * i, 200), (2, 2, 2 + side, 2 + side))
            image.save(root / name / f"{i}.png")
            captions.append({"file_name": f"{i}.png", "text": f"a square, {i % 3}"})
        (root / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--max_train_steps", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.base is None:
        tiny_stable_diffusion(arguments.output_dir / "base")
    draw_images(arguments.output_dir / "images")
    settings = TrainingArguments(
        pretrained_model_name_or_path=arguments.base or str(arguments.output_dir / "base"),
        train_data_dir=str(arguments.output_dir / "images"),
        output_dir=str(arguments.output_dir / "adapter"),
        train_batch_size=6, snr_gamma=5.0, max_train_steps=arguments.max_train_steps,
        num_validation_images=2, num_inference_steps=4, validation_prompt="a square",
    )  # fmt: skip
    print(f"The adapter and its sample grid are in {train(settings)}.")


if __name__ == "__main__":
    main()
