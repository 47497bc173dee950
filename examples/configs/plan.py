"""Writes the settings files of this folder, each with the memory that a run with it takes, computed from shapes.

    python -m examples.configs.plan [sd15 flux1-dev-24gb.yaml ...]

Neither weights nor a GPU are needed: a step of the training is taken with tensors that have shapes and no values.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from .memory import peaks
from .shapes import SHAPES
from .sizes import COMMON, SIZES

FOLDER = Path(__file__).parent


def text(base: str, size: int) -> str:
    """The content of that file."""
    shape, settings = SHAPES[base], COMMON | SIZES[base][size]
    memory = {name: f"{number / 1e9:.1f}" for name, number in peaks(shape, settings).items()}
    peak = max(memory["before"], memory["step"], key=float)
    return (
        f"# {shape.title} on a GPU of {size} GB. Peak memory, computed from shapes by plan.py: {peak} GB.\n"
        f"# Before the first step {memory['before']} GB; in a step {memory['step']} GB, of which base "
        f"{memory['base']} GB and\n# kept for the backward pass {memory['kept for the backward pass']} GB. What "
        f"kernels need besides comes on top.\n#\n{f'# {shape.first}' + chr(10) + '#' + chr(10) if shape.first else ''}"
        f"#   hf-causal-context train --config {file_name(base, size)} --train_data_dir my-images --output_dir "
        "my-adapter\n" + yaml.safe_dump({"pretrained_model_name_or_path": shape.name, **settings}, sort_keys=False)
    )


def file_name(base: str, size: int) -> str:
    """The settings file of a base for a GPU of a size, in GB."""
    return f"{base}-{size}gb.yaml"


def main() -> None:
    """Write the files, or those that are named, or of bases that are named."""
    parser = argparse.ArgumentParser(description="Write the settings files of this folder.")
    parser.add_argument("which", nargs="*", default=[*SIZES], help="files, or all of a base: " + ", ".join(SIZES))
    which = parser.parse_args().which
    for base, sizes in SIZES.items():
        for size in sizes:
            if not {base, name := file_name(base, size)}.isdisjoint(which):
                FOLDER.joinpath(name).write_text(text(base, size), encoding="utf-8")


if __name__ == "__main__":
    main()
