"""`hf-causal-context generate`: images or videos of chosen contexts as files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .._files import complete_or_absent
from ..data.arguments import argument
from .adapter_arguments import ContextArguments, ImageArguments, RevisionArguments
from .replaced import told_replacements


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

    Clips of several frames become videos (``.mp4``), and strips of frames in the grid.

    Raises:
        ValueError: for contexts that would have one file, another kind of adapter, an unknown base, unknown concepts,
            or what `generate` refuses.
        OSError: for an adapter or base that cannot be read, or images that cannot be written.
    """
    from ..bases.images import image_grid, to_image
    from ..inference.context_files import context_files
    from ..inference.sampling import generate
    from ..media.videos import save_video, video_package

    contexts, output_dir, seeds = arguments.parsed(), arguments.output_dir, arguments.seeds
    names = context_files(contexts, arguments.observational_name)
    stored = arguments.open()
    meant = stored.meant(contexts, arguments.calibrated)
    base = stored.pipeline(meant, variant=arguments.variant, **arguments.weights)
    if base.is_video and not arguments.grid and arguments.num_frames != 1:
        video_package()  # else it would be missed after the work
    rows = generate(base, meant, seeds=seeds, **arguments.options())
    output_dir.mkdir(parents=True, exist_ok=True)
    labels = [str(context) or arguments.observational_name for context in contexts]
    with told_replacements(output_dir) as paths:
        if arguments.grid:
            paths.append(output_dir / "grid.png")
            with complete_or_absent(paths[0]) as unfinished:
                image_grid(rows, labels).save(unfinished)
            return paths
        for context, row in zip(contexts, rows, strict=True):
            for seed, image in zip(seeds, row, strict=True):
                clip = base.is_video and len(image) > 1
                paths.append(output_dir / f"{names[context]}-seed{seed}.{'mp4' if clip else 'png'}")
                with complete_or_absent(paths[-1]) as unfinished:
                    if clip:
                        save_video([to_image(frame) for frame in image], unfinished, base.frame_rate)
                    else:
                        to_image(image).save(unfinished)
    return paths
