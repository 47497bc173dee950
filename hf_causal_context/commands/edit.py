"""`hf-causal-context edit`: what given images would have been in other contexts, as files."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import complete_or_absent, file_name, first_line
from ..data.arguments import argument
from ..errors import UserValueError
from ..messages.progress import say
from .adapter_arguments import ContextArguments, RevisionArguments, parse_contexts
from .replaced import told_replacements

if TYPE_CHECKING:
    from PIL import Image

    from ..contexts import Context


@dataclass(kw_only=True)
class Arguments(RevisionArguments, ContextArguments):
    """Settings of the command."""

    images: list[Path] = field(metadata={"help": "Files of images to edit.", "aliases": ["--image"]})
    output_dir: Path = field(metadata={"help": "Folder for the edits."})
    from_context: str | None = argument(None, "What the images were made in; by default no intervention.")
    strengths: list[float] = argument([1.0], "How far to go: 0 is the image, 1 the context.")
    mask: Path | None = argument(None, "Gray image: white where the edit may act.")
    prompt: str | None = argument(None, "Of the images, for bases that take text.")
    class_label: int | None = argument(None, "Of the images, for class-conditional bases.")
    num_inference_steps: int = argument(50, "Denoising steps.")
    batch_size: int = argument(8, "Images at once.")
    variant: str | None = argument(None, "Of the base's files, such as fp16.")


def run(arguments: Arguments) -> None:
    """Write the edits, and print their paths."""
    for path in edit_files(arguments):
        print(path)


def edit_files(arguments: Arguments) -> list[Path]:
    """Write one PNG per image, context and strength (``photo-thick+slant-0.5.png``), and return the paths.

    Beside them lies the image as the base draws it again after some noise, ``photo-reconstruction.png``. A warning
    names the images where that is visibly another image.

    Raises:
        ValueError: for two files of the same name, another kind of adapter, and what `counterfactual` refuses.
        OSError: for an image, adapter or base that cannot be read, or edits that cannot be written.
    """
    if twice := [name for name, count in Counter(path.stem for path in arguments.images).items() if count > 1]:
        raise UserValueError(
            f"--images: {', '.join(twice)}: several images have this name, and their edits would be the same files. "
            "Rename them, or edit them in another folder."
        )
    from ..bases.images import to_image
    from ..inference.counterfactuals import counterfactuals, doubt

    contexts, strengths = list(dict.fromkeys(arguments.parsed())), list(dict.fromkeys(arguments.strengths))
    (source,) = parse_contexts([arguments.from_context or arguments.observational_name], arguments.observational_name)
    remarked: defaultdict[str, list[str]] = defaultdict(list)
    images = {path.stem: _opened(path, "--images", remarked) for path in arguments.images}
    edits, reconstructions = _files(arguments, product(images, contexts, strengths))
    for name, image in images.items():
        if (side := min(image.size)) < max(image.size):
            say(
                f"{name}: edits are squares, so of its {image.width} x {image.height} pixels the {side} x {side} in "
                "the middle are kept."
            )
    mask = None if arguments.mask is None else _opened(arguments.mask, "--mask", remarked)
    for remark, named in remarked.items():
        warnings.warn(f"{len(named)} images ({', '.join(named)}) {remark}", stacklevel=2)
    stored = arguments.open()
    meant = stored.meant([*contexts, source], arguments.calibrated)
    base = stored.pipeline(meant, variant=arguments.variant, **arguments.weights)

    names = list(images)
    with told_replacements(arguments.output_dir) as paths:
        for start in range(0, len(names), arguments.batch_size):
            batch = names[start : start + arguments.batch_size]
            found = counterfactuals(
                base,
                [images[name] for name in batch],
                contexts,
                source,
                strengths=strengths,
                mask=mask,
                prompt=arguments.prompt,
                class_label=arguments.class_label,
                num_inference_steps=arguments.num_inference_steps,
                calibrated=arguments.calibrated,
            )
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            for row, name in enumerate(batch):
                made = {
                    edits[name, context, strength]: edited[row]
                    for context, of_context in zip(contexts, found, strict=True)
                    for strength, edited in zip(strengths, of_context.images, strict=True)
                }
                made[reconstructions[name]] = found[0].reconstruction[row]
                for path, image in made.items():
                    paths.append(path)
                    with complete_or_absent(path) as unfinished:
                        to_image(image).save(unfinished)
                error = float(found[0].reconstruction_error[row])
                print(f"{name}: reconstruction error {error:.4f} (root mean square; images go from 0 to 1)")
                if doubted := doubt(error):
                    warnings.warn(f"{name}: {doubted} See {reconstructions[name]}.", stacklevel=2)
    return paths


def _files(
    arguments: Arguments, edits: Iterable[tuple[str, Context, float]]
) -> tuple[dict[tuple[str, Context, float], Path], dict[str, Path]]:
    """Return where each edit (of an image, to a context, at a strength) and each image's reconstruction are written.

    Raises:
        ValueError: if one would be written over another, or over an image.
    """
    folder, empty = arguments.output_dir, arguments.observational_name
    places = {
        (name, context, strength): folder
        / f"{name}-{file_name(str(context) or empty)}{'' if strength == 1 else f'-{strength:g}'}.png"
        for name, context, strength in edits
    }
    reconstructions = {path.stem: folder / f"{path.stem}-reconstruction.png" for path in arguments.images}
    files = [*places.values(), *reconstructions.values()]
    # Some file systems do not tell cases apart.
    uses = Counter(os.path.realpath(path).casefold() for path in [*arguments.images, *files])
    if twice := [path for path in files if uses[os.path.realpath(path).casefold()] > 1]:
        raise UserValueError(
            f"{', '.join(map(str, dict.fromkeys(twice)))}: an edit would be written over another one, over a "
            "reconstruction, or over an image. Rename the images, or edit them one by one, or in one context at a "
            "time, into another --output_dir."
        )
    return places, reconstructions


def _opened(path: Path, option: str, remarked: dict[str, list[str]]) -> Image.Image:
    """An image, read whole; remarks on what of it is not used are noted with its path.

    Raises:
        OSError: naming the option.
        ValueError: as `remarks`.
    """
    from PIL import Image

    from ..media.pixels import remarks

    try:
        with Image.open(path) as image:
            for remark in remarks(image):
                remarked[remark].append(str(path))
            image.load()  # last: to count the frames, others were read
            return image
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise OSError(
            f"{option}: {path} cannot be read as an image ({reason}). Give a file such as photo.png."
        ) from error
