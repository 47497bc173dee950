"""What differs between the settings files: by base, and by the memory of the GPU in GB."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {"mixed_precision": "bf16", "learning_rate": 1e-4, "max_train_steps": 4000}
NF4: dict[str, Any] = {"quantization": "nf4"}
INT8: dict[str, Any] = {"quantization": "llm_int8"}
LARGE: dict[str, Any] = {"resolution": 1024}
LARGEST: dict[str, Any] = {"resolution": 2048}
HIGH: dict[str, Any] = {"noise_expert": "high"}


def rows(at_once: int, gradient_checkpointing: bool = True) -> dict[str, Any]:
    """Eight rows a step, so many of them at once."""
    batches = {"train_batch_size": at_once, "gradient_accumulation_steps": 8 // at_once}
    return batches | ({"gradient_checkpointing": True} if gradient_checkpointing else {})


def clip(num_frames: int, resolution: int = 480) -> dict[str, Any]:
    """The size of a clip."""
    return {"resolution": resolution, "num_frames": num_frames, "num_validation_images": 1}


FRUGAL, ROOMY = rows(1), rows(4)


def fast(at_once: int) -> dict[str, Any]:
    """The same, with no activations computed twice: a third of the time less."""
    return rows(at_once, gradient_checkpointing=False)


SIZES: dict[str, dict[int, dict[str, Any]]] = {
    "sd15": {12: {"resolution": 512, "train_batch_size": 6}, 24: {"resolution": 512, "train_batch_size": 16}},
    "sdxl": {12: LARGE | FRUGAL, 16: LARGE | rows(8), 24: LARGE | fast(2)},
    "sd35-medium": {12: LARGE | NF4 | FRUGAL, 24: LARGE | ROOMY},
    "sd35-large": {16: LARGE | NF4 | FRUGAL, 48: LARGE | ROOMY},
    "pixart-sigma": {12: LARGE | INT8 | ROOMY, 16: LARGE | fast(2)},
    "flux1-dev": {
        12: {"resolution": 512, **NF4, **FRUGAL},
        16: LARGE | NF4 | FRUGAL,
        24: LARGE | INT8 | FRUGAL,
        48: LARGE | ROOMY,
        80: LARGE | fast(1),
    },
    "flux2-klein-4b": {12: LARGE | INT8 | FRUGAL, 24: LARGE | ROOMY, 48: LARGE | fast(2)},
    "flux2-klein-9b": {16: LARGE | NF4 | FRUGAL, 48: LARGE | ROOMY, 80: LARGE | fast(1)},
    "flux2-dev": {48: LARGE | NF4 | FRUGAL, 80: LARGE | INT8 | ROOMY},
    "chroma": {12: LARGE | NF4 | FRUGAL, 24: LARGE | INT8 | rows(2), 48: LARGE | ROOMY},
    "qwen-image": {24: LARGE | NF4 | FRUGAL, 48: LARGE | INT8 | ROOMY, 80: LARGE | ROOMY},
    "krea2": {16: LARGE | NF4 | FRUGAL, 24: LARGE | INT8 | FRUGAL, 48: LARGE | rows(2), 80: LARGE | fast(1)},
    "z-image": {12: LARGE | NF4 | FRUGAL, 16: LARGE | INT8 | FRUGAL, 24: LARGE | FRUGAL, 80: LARGE | fast(1)},
    "sana": {12: LARGE | ROOMY, 24: LARGE | fast(4)},
    "lumina2": {12: LARGE | INT8 | FRUGAL, 48: LARGE | fast(1)},
    "auraflow": {12: LARGE | INT8 | FRUGAL, 48: LARGE | fast(1)},
    "hidream": {24: LARGE | NF4 | FRUGAL, 48: LARGE | INT8 | ROOMY, 80: LARGE | ROOMY},
    "cogview4": {12: LARGE | NF4 | FRUGAL, 24: LARGE | INT8 | ROOMY, 48: LARGE | fast(1)},
    "hunyuan-image": {24: LARGEST | NF4 | FRUGAL, 48: LARGEST | INT8 | ROOMY},
    "wan21-1.3b": {12: clip(33) | INT8 | FRUGAL, 24: clip(81) | rows(2)},
    "wan22-a14b": {
        24: HIGH | clip(17, 384) | NF4 | FRUGAL,
        48: HIGH | clip(33) | INT8 | FRUGAL,
        80: HIGH | clip(81) | FRUGAL,
    },
    "ltx": {12: clip(49, 512) | INT8 | FRUGAL, 24: clip(97, 512) | fast(1)},
    "cogvideox-5b": {24: clip(17) | INT8 | FRUGAL, 48: clip(49) | rows(2)},
    "hunyuan-video": {24: clip(17) | NF4 | FRUGAL, 48: clip(61) | INT8 | FRUGAL, 80: clip(61) | rows(2)},
    "mochi": {24: clip(19) | INT8 | FRUGAL, 48: clip(37) | FRUGAL},
}
