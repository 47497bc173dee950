"""Images of the class for prior preservation: under their own prompt, the adapter shall leave the base as it was.

They are trained in the empty context, where of the adapter the observational part alone acts: it is on in every
context, so it is what may drift under prompts that it was not trained on. Without the observational part, which is the
base's own world, nothing could drift: there an adapter (independent or anchored) adds nothing, and would learn nothing.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, concatenate_datasets
from PIL import Image

from ...data import InterventionalData
from ...data.folders import IMAGE_SUFFIXES, visible_files
from ...data.masks import is_mask
from ...errors import UserValueError
from ...media.pixels import plain
from ..arguments import TrainingArguments

CLASS_IMAGES = "class images"  # the name under which they have a share of the batches


def class_images(arguments: TrainingArguments) -> list[str]:
    """Return the files of the class images, none where no folder is named; masks in it are none, and not read.

    Raises:
        ValueError: for a folder without images.
    """
    if arguments.class_data_dir is None:
        return []
    folder = Path(arguments.class_data_dir)
    images = sorted(str(file) for file in visible_files(folder, IMAGE_SUFFIXES) if not is_mask(file))
    if not images:
        raise UserValueError(
            f"--class_data_dir={str(folder)!r} has no images. Put images of the class into it, such as those that the "
            "base makes of --class_prompt."
        )
    return images


def with_class_images(data: InterventionalData, rows: Dataset, arguments: TrainingArguments) -> Dataset:
    """Return the rows of the data, followed by the class images if there are some, all with captions.

    Raises:
        ValueError: for a folder without images, images that cannot be read, or a concept of their name.
    """
    images = class_images(arguments)
    if not images:
        return rows
    for image in images:
        try:
            with Image.open(image) as opened:
                plain(opened).load()
        except Exception as error:  # decoders raise whatever they like
            raise UserValueError(f"{image!r} cannot be read: {error}. Replace or remove it.") from error
    if CLASS_IMAGES in data.concepts:
        raise UserValueError(f"The concept {CLASS_IMAGES!r} has the name of --class_data_dir's images. Rename it.")
    if not data.has_captions:
        rows = rows.add_column("caption", [arguments.instance_prompt] * len(rows))  # type: ignore[call-arg]
    rows = rows.select_columns([data.content_column, "context", "caption", *(["mask"] if data.has_masks else [])])
    columns: dict[str, list[str] | list[None]] = {
        data.content_column: images,
        "context": [CLASS_IMAGES] * len(images),
        "caption": [arguments.class_prompt] * len(images),
    }
    if data.has_masks:
        columns["mask"] = [None] * len(images)
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=rows.features)])
