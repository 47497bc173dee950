"""Prints what a training step takes on well-known bases, of one image or text: the table in guides/scale.md.

    python -m examples.configs.table [sd15 llama31-8b ...]

Memory and arithmetic come from the computation that the settings files have theirs from.
"""

from __future__ import annotations

import argparse
from typing import Any

from hf_causal_context.training.dry_run import readable

from .memory import language_peaks, peaks
from .parts import LanguageShape
from .shapes import LANGUAGE, SHAPES

TFLOP_PER_SECOND = 170  # of one H200 at the size of Stable Diffusion 1.5: `examples/benchmarks/gpu_training.py`
# What one sample is.
SAMPLES: dict[str, dict[str, Any]] = {
    "sd15": {"resolution": 512},
    "sdxl": {"resolution": 1024},
    "flux1-dev": {"resolution": 1024},
    "qwen-image": {"resolution": 1024},
    **{base: {} for base in LANGUAGE},
}


def row(base: str) -> dict[str, str]:
    """One row of the table."""
    settings: dict[str, Any] = {"mixed_precision": "bf16", "train_batch_size": 1, **SAMPLES[base]}
    shape: Any = (LANGUAGE | SHAPES)[base]
    compute: Any = language_peaks if isinstance(shape, LanguageShape) else peaks
    plain, checkpointed = (compute(shape, settings | {"gradient_checkpointing": on}) for on in (False, True))
    return {
        "base": shape.title,
        "a sample": f"{shape.tokens:,} tokens" if base in LANGUAGE else f"{settings['resolution']} pixels",
        "the base": readable(plain["base"]),
        "adapter": f"{plain['adapter'] / 4e6:.1f} M",
        "kept for backward": readable(plain["kept for the backward pass"]),
        "step": readable(plain["step"]),
        "step, checkpointed": readable(checkpointed["step"]),
        "TFLOP": f"{plain['TFLOP']:.3g}",
        "time": f"{plain['TFLOP'] / TFLOP_PER_SECOND:.1g} s",
    }


def main() -> None:
    """Print the table, or the rows that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", help=", ".join(SAMPLES))
    for number, base in enumerate(parser.parse_args().bases or SAMPLES):
        cells = row(base)
        if not number:
            print("| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|")
        print("| " + " | ".join(cells.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
