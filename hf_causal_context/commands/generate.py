"""`hf-causal-context generate`: images of chosen contexts as files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..contexts import file_name
from ..data.arguments import argument
from .adapter_arguments import ContextArguments, ImageArguments, RevisionArguments


@dataclass(kw_only=True)
class Arguments(RevisionArguments, ContextArguments, ImageArguments):
    """Settings of the command."""

    output_dir: Path = field(metadata={"help": "Folder for the images."})
    variant: str | None = argument(None, "Of the base's files, such as fp16.")
    seeds: list[int] = argument(list(range(8)), "One image per context and seed.")
    grid: bool = argument(False, "One grid.png instead of one file per image.")


def run(arguments: Arguments) -> None:
    """Write the images, and print their paths."""
    for path in generate_files(arguments):
        print(path)


def generate_files(arguments: Arguments) -> list[Path]:
    """Write one PNG per context and seed (``thick+slant-seed3.png``), or one grid, and return the paths.

    Raises:
        ValueError: for another kind of adapter, an unknown base, unknown concepts, or what `generate` refuses.
        OSError: for an adapter or base that cannot be read, or images that cannot be written.
    """
    from ..bases.images import image_grid, to_image
    from ..inference.sampling import generate

    contexts, output_dir, seeds = arguments.parsed(), arguments.output_dir, arguments.seeds
    stored = arguments.open()
    meant = stored.meant(contexts, arguments.calibrated)
    base = stored.pipeline(meant, variant=arguments.variant, **arguments.weights)
    rows = generate(base, meant, seeds=seeds, **arguments.options())
    output_dir.mkdir(parents=True, exist_ok=True)
    labels = [str(context) or arguments.observational_name for context in contexts]
    if arguments.grid:
        path = output_dir / "grid.png"
        image_grid(rows, labels).save(path)
        return [path]
    paths = []
    for label, row in zip(labels, rows, strict=True):
        for seed, image in zip(seeds, row, strict=True):
            paths.append(output_dir / f"{file_name(label)}-seed{seed}.png")
            to_image(image).save(paths[-1])
    return paths
