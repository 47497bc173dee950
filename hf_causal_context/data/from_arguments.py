"""The data that arguments name: images or texts, from folders or a dataset."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import UserValueError
from ..media.videos import VIDEO_SUFFIXES
from . import (
    InterventionalData,
    from_attributes,
    from_dataset,
    load_folders,
    load_text_folders,
    open_dataset,
    texts_from_attributes,
    texts_from_dataset,
)
from .arguments import (
    AnyDataArguments,
    ContextDataArguments,
    DataArguments,
    TextDataArguments,
    check_apart,
    check_source,
    refuse_useless,
)
from .captions import METADATA
from .columns import Rows, known_features, require_columns, require_images
from .folders import IMAGE_SUFFIXES, skipped, visible_files
from .text_rows import TEXT_SUFFIXES, text_columns


def load_data(arguments: DataArguments) -> InterventionalData:
    """Return the images that the arguments name.

    Raises:
        ValueError: for none or two sources, and what the loaders in `data` raise.
    """
    check_source(arguments)
    check_apart(arguments)
    if arguments.train_data_dir is not None:
        if arguments.mask_column is not None:
            raise UserValueError(
                f"--mask_column={arguments.mask_column!r} is for datasets. In folders, put a.mask.png beside a.png."
            )
        if arguments.pair_column is not None:
            raise UserValueError(
                f"--pair_column={arguments.pair_column!r} is for datasets. In folders, --paired_files says that files "
                "of the same name show one sample."
            )
        return load_folders(
            arguments.train_data_dir,
            caption_column=arguments.caption_column,
            frame_folders=arguments.num_frames is not None,
            paired_files=arguments.paired_files,
            **_folder_options(arguments),
        )
    if arguments.paired_files:
        raise UserValueError(
            "--paired_files is for folders. Of a dataset, name the column that says which rows show one sample: "
            "--pair_column."
        )
    columns: dict[str, Any] = {
        "content_column": arguments.image_column,
        "caption_column": arguments.caption_column,
        "mask_column": arguments.mask_column,
        "pair_column": arguments.pair_column,
    }
    dataset = _open_images(arguments)
    if arguments.attribute_rules:
        rules = _parse_rules(arguments.attribute_rules)
        return from_attributes(dataset, rules, context_column=arguments.context_column, **columns, **_choice(arguments))
    return from_dataset(dataset, **columns, **_dataset_options(arguments))


def load_text_data(arguments: TextDataArguments) -> InterventionalData:
    """Return the texts that the arguments name.

    Raises:
        ValueError: for none or two sources, and what the loaders in `data` raise.
    """
    check_source(arguments)
    check_apart(arguments)
    if arguments.train_data_dir is not None:
        return load_text_folders(arguments.train_data_dir, **_folder_options(arguments))
    column = arguments.text_column
    if arguments.attribute_rules:
        rules = _parse_rules(arguments.attribute_rules)
        return texts_from_attributes(
            _open(arguments), rules, context_column=arguments.context_column, text_column=column, **_choice(arguments)
        )
    return texts_from_dataset(_open(arguments), text_column=column, **_dataset_options(arguments))


def load_any_data(arguments: AnyDataArguments) -> InterventionalData:
    """Return the images or texts that the arguments name.

    A folder holds texts if there are some and not all of its folders have images; a dataset, if `text_column` is
    given, or if it has texts under one of the names that are looked for and no `image_column`.

    Raises:
        ValueError: for options of images where the data holds texts, and see `load_data`.
    """
    check_source(arguments)
    if arguments.train_data_dir is not None:
        texts = _holds_texts(Path(arguments.train_data_dir))
    elif arguments.text_column:
        texts = True
    else:
        _, features = known_features(_open(arguments))
        texts = arguments.image_column not in features and bool(text_columns(features))
    if not texts:
        return load_data(arguments)
    of_images = {field.name for field in fields(DataArguments)} - {field.name for field in fields(ContextDataArguments)}
    refuse_useless(arguments, sorted(of_images), "The data holds texts")
    return load_text_data(replace(arguments, text_column=arguments.text_column or "text"))


def _open(arguments: ContextDataArguments) -> Rows:
    assert arguments.dataset_name is not None
    return open_dataset(
        arguments.dataset_name, config_name=arguments.dataset_config_name, streaming=arguments.streaming
    )


def _open_images(arguments: DataArguments) -> Rows:
    dataset, features = known_features(_open(arguments))
    if (classes := arguments.class_column) is not None:
        require_columns(features, {classes: "--class_column"})
    require_images(features, arguments.image_column)
    return dataset


def _choice(arguments: ContextDataArguments) -> dict[str, Any]:
    return {
        "observational_name": arguments.observational_name,
        "held_out_contexts": arguments.held_out_contexts,
        "training_contexts": arguments.training_contexts,
    }


def _folder_options(arguments: ContextDataArguments) -> dict[str, Any]:
    return {
        "concepts": arguments.concepts,
        "streaming": arguments.streaming,
        **_choice(arguments),
    }


def _dataset_options(arguments: ContextDataArguments) -> dict[str, Any]:
    return {
        "concepts": arguments.concepts,
        "context_column": arguments.context_column,
        **_choice(arguments),
    }


def _holds_texts(root: Path) -> bool:
    paths = root.iterdir() if root.is_dir() else ()
    folders = [path for path in paths if path.is_dir() and not path.name.startswith(".")] or [root]
    texts = any(file.name not in METADATA for folder in folders for file in visible_files(folder, TEXT_SUFFIXES))
    images = [any(True for _ in visible_files(folder, IMAGE_SUFFIXES | VIDEO_SUFFIXES)) for folder in folders]
    if not texts and not any(images) and (files := sorted(visible_files(root))):
        raise UserValueError(
            f"{str(root)!r} has neither images nor texts. {' '.join(skipped(files, root))} Allowed are, in one folder "
            "per context, the formats of Pillow, such as .png and .jpg, videos, such as .mp4, and texts: .txt, with "
            f"one text per line, or .jsonl, with one object per line, but not {METADATA[0]}."
        )
    return texts and not all(images)


def _parse_rules(items: list[str]) -> dict[str, str]:
    rules: dict[str, str] = {}
    for item in items:
        concept, colon, rule = item.partition(":")
        if not colon:
            raise UserValueError(
                f"--attribute_rules {item!r} must be a concept, a colon and a rule, such as "
                "'smiling: Smiling == 1 and Eyeglasses == 0'."
            )
        if concept.strip() in rules:
            raise UserValueError(
                f"--attribute_rules has two rules for {concept.strip()!r}. Join them by and, or by or, in one."
            )
        rules[concept.strip()] = rule.strip()
    return rules
