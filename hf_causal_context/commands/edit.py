"""`hf-causal-context edit`: what given images would have been in other contexts, as files."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..contexts import file_name
from ..data.arguments import argument
from ..errors import UserValueError
from .adapter_arguments import ContextArguments, RevisionArguments, parse_contexts

if TYPE_CHECKING:
    from PIL import Image


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
    num_inference_steps: int = argument(50, "Denoising steps; more follow the image more closely.")
    batch_size: int = argument(8, "Images at once.")
    variant: str | None = argument(None, "Of the base's files, such as fp16.")


def run(arguments: Arguments) -> None:
    """Write the edits, and print their paths."""
    for path in edit_files(arguments):
        print(path)


def edit_files(arguments: Arguments) -> list[Path]:
    """Write one PNG per image, context and strength (``photo-thick+slant-0.5.png``), and return the paths.

    Beside them lies what the image became when it was taken apart and drawn again, ``photo-reconstruction.png``.
    A warning names the images where that is visibly another image.

    Raises:
        ValueError: for images of the same name, another kind of adapter, and what `counterfactual` refuses.
        OSError: for an image, adapter or base that cannot be read, or edits that cannot be written.
    """
    if twice := [name for name, count in Counter(path.stem for path in arguments.images).items() if count > 1]:
        raise UserValueError(
            f"--images: {', '.join(twice)}: several images have this name, and their edits would be the same files. "
            "Rename them, or edit them in another folder."
        )
    if arguments.batch_size < 1:
        raise UserValueError(f"--batch_size {arguments.batch_size} must be at least 1.")
    from ..bases.images import to_image
    from ..inference.counterfactuals import counterfactual, doubt

    contexts = arguments.parsed()
    (source,) = parse_contexts([arguments.from_context or arguments.observational_name], arguments.observational_name)
    images = {path.stem: _opened(path) for path in arguments.images}
    mask = None if arguments.mask is None else _opened(arguments.mask)
    stored = arguments.open()
    meant = stored.meant([*contexts, source], arguments.calibrated)
    base = stored.pipeline(meant, variant=arguments.variant, **arguments.weights)

    paths, names = [], list(images)
    for start in range(0, len(names), arguments.batch_size):
        batch = names[start : start + arguments.batch_size]
        for context in contexts:
            found = counterfactual(
                base,
                [images[name] for name in batch],
                context,
                source,
                strengths=arguments.strengths,
                mask=mask,
                prompt=arguments.prompt,
                class_label=arguments.class_label,
                num_inference_steps=arguments.num_inference_steps,
                calibrated=arguments.calibrated,
            )
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            label = file_name(str(context) or arguments.observational_name)
            for row, name in enumerate(batch):
                for strength, edits in zip(arguments.strengths, found.images, strict=True):
                    end = "" if strength == 1 else f"-{strength:g}"
                    paths.append(arguments.output_dir / f"{name}-{label}{end}.png")
                    to_image(edits[row]).save(paths[-1])
                reconstruction = arguments.output_dir / f"{name}-reconstruction.png"
                to_image(found.reconstruction[row]).save(reconstruction)
                if context == contexts[0]:
                    paths.append(reconstruction)
                    error = float(found.reconstruction_error[row])
                    print(f"{name}: reconstruction error {error:.4f} (root mean square; images go from 0 to 1)")
                    if doubted := doubt(error):
                        warnings.warn(f"{name}: {doubted} See {reconstruction}.", stacklevel=2)
    return paths


def _opened(path: Path) -> Image.Image:
    """An image, read whole."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return image
