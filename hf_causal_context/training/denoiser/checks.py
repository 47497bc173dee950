"""What a base is conditioned on against what the data and the settings give, before any work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from datasets import ClassLabel, Dataset, Features, Value

from ...bases.diffusion_base import DiffusionBase
from ...data import InterventionalData
from ...data.columns import require_images
from ...errors import UserValueError
from ..arguments import TrainingArguments


def check_conditions(base: DiffusionBase, data: InterventionalData, arguments: TrainingArguments) -> None:
    """Refuse captions, classes and their settings where a base and the data do not have them.

    Raises:
        ValueError: naming what does not fit.
    """
    column, name = arguments.class_column, type(base.pipe).__name__
    require_images(data.rows.features or Features(), data.content_column)
    if data.has_masks and base.is_video:
        raise UserValueError(f"The data has masks, which are for bases of images; {name} makes videos. Remove them.")
    for argument in ("aspect_ratio_buckets", "class_data_dir"):
        if data.has_videos and getattr(arguments, argument):
            raise UserValueError(f"--{argument} is for images, and the data holds videos. Leave it out.")
    columns = data.rows.column_names or []
    if base.takes_classes and (column is None or column not in columns):
        raise UserValueError(
            f"This {name} is conditioned on classes, but --class_column={column} names no column of the data. It "
            f"has: {', '.join(columns)}."
        )
    if base.takes_classes:
        check_classes(base, data, cast(str, column))
    if column is not None and not base.takes_classes:
        raise UserValueError(f"--class_column={column} was given, but this {name} takes no classes. Leave it out.")
    for argument in ("instance_prompt", "validation_prompt", "class_prompt"):
        if (text := getattr(arguments, argument)) and not base.takes_captions:
            raise UserValueError(f"--{argument}={text!r} was given, but {name} takes no captions. Leave it out.")
    if data.has_captions and not base.takes_captions:
        raise UserValueError(f"The data has captions, but {name} takes none. Leave --caption_column or them out.")
    prompt = arguments.instance_prompt
    if data.has_captions and prompt:
        raise UserValueError(
            f"--instance_prompt={prompt!r} captions images that have no captions, but the data has some. Leave one "
            "of the two out."
        )
    given = {"--caption_dropout": arguments.caption_dropout, "--shuffle_tags": arguments.shuffle_tags}
    if (changing := [option for option, value in given.items() if value]) and not (data.has_captions or prompt):
        raise UserValueError(
            f"{' and '.join(changing)}: the images have no captions to change. Caption them, or leave this out."
        )
    if arguments.shuffle_tags and not data.streaming:
        captions = cast(Dataset, data.rows).unique("caption") if data.has_captions else [prompt]
        if not any("," in caption for caption in captions):
            raise UserValueError(
                f"--shuffle_tags was given, but no caption has a comma, such as {captions[0]!r}. Put commas between "
                "the tags, or leave it out."
            )
    if arguments.aspect_ratio_buckets and base.fixed_size:
        raise UserValueError(
            f"--aspect_ratio_buckets needs a base of any size, and {name} generates "
            f"{base.default_resolution} x {base.default_resolution} pixels only. Leave it out."
        )
    if arguments.class_data_dir is not None:
        captions = cast(Dataset, data.rows).unique("caption") if data.has_captions else []
        if arguments.class_prompt in captions:
            raise UserValueError(
                f"--class_prompt={arguments.class_prompt!r} is a caption of the data, too. Give another one: it tells "
                "images of the class from the others."
            )


def check_classes(base: DiffusionBase, data: InterventionalData, column: str) -> None:
    """Refuse a column that does not hold numbers of the base's classes; of a stream, as far as its type tells.

    Raises:
        ValueError: naming what it holds.
    """
    feature = (data.rows.features or {}).get(column)
    if not (
        feature is None or isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)
    ):
        raise UserValueError(
            f"--class_column={column} holds {feature}, and must hold the numbers of classes. Name another column, or "
            "cast it: dataset.cast_column(name, datasets.ClassLabel(names=...))."
        )
    for rows in (data.rows, *data.held_out.values()):
        if isinstance(rows, Dataset):
            check_labels(base, rows.select_columns([column]).unique(column), column)


def check_labels(base: DiffusionBase, labels: Iterable[Any], column: str) -> None:
    """Refuse labels of rows that are no numbers of the base's classes.

    Raises:
        ValueError: naming them.
    """
    number = cast(int, base.num_classes)
    if wrong := [label for label in labels if label is None or not 0 <= label < number]:
        raise UserValueError(
            f"--class_column={column} holds {', '.join(map(str, wrong[:5]))}, but this {type(base.pipe).__name__} is "
            f"conditioned on classes 0 to {number - 1}. Correct these rows, or remove them."
        )
