"""The settings that say where interventional data is, under the argument names of diffusers' training scripts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserValueError

# Options for datasets, which would do nothing beside a folder -> what they are if they were not given.
_OF_DATASETS = {
    "dataset_config_name": (None,),
    "context_column": ("context",),
    "image_column": ("image",),
    "class_column": (None,),
    "text_column": ("text", ""),
}


def argument(default: Any, meaning: str, **metadata: Any) -> Any:
    """Return a dataclass field with a default and a help text; metadata goes to argparse."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": meaning, **metadata})
    return field(default=default, metadata={"help": meaning, **metadata})


def refuse_useless(arguments: Any, names: Iterable[str], reason: str) -> None:
    """Refuse settings that are not left at their defaults although they would do nothing.

    Args:
        arguments: a dataclass.
        names: of the fields that do nothing.
        reason: why, as a sentence that the message begins with, without its full stop.

    Raises:
        ValueError: naming the options.
    """
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(arguments)
    }
    if useless := [f"--{name}" for name in names if getattr(arguments, name) != defaults[name]]:
        raise UserValueError(f"{reason}, so {', '.join(useless)} would have no effect. Leave it out.")


@dataclass
class ContextDataArguments:
    """Where interventional data is and which of its contexts are trained on."""

    train_data_dir: str | None = argument(None, "Folder with one sub-folder per context: obs/, thick/ ...")
    dataset_name: str | None = argument(None, "Instead: a dataset on the Hub or on disk with a context column.")
    dataset_config_name: str | None = argument(None, "Its configuration.")
    context_column: str = argument(
        "context", "Column of the contexts; with --attribute_rules, of those that they make."
    )
    attribute_rules: list[str] = argument(
        [], "Contexts from attribute columns instead: 'smiling: Smiling == 1 and Eyeglasses == 0' ..."
    )
    observational_name: str = argument("obs", "What the observational context is called in folders and columns.")
    concepts: list[str] | None = argument(None, "The concepts; by default those the data holds.")
    held_out_contexts: list[str] = argument([], "Contexts that are not trained on, besides all combinations.")
    training_contexts: list[str] | None = argument(
        None, "Contexts that are trained on, combinations too; by default obs and the single concepts."
    )
    context_weights: list[str] = argument(
        [], "Shares of contexts in batches, such as obs=2 (others 1, divided among strengths)."
    )
    streaming: bool = argument(False, "Read the data as a stream: for data larger than memory.")


@dataclass
class DataArguments(ContextDataArguments):
    """Where interventional images are and how they are read."""

    image_column: str = argument("image", "Column of the images.")
    caption_column: str | None = argument(
        None, "Column of the captions, for bases that take text; of folders, in metadata."
    )
    mask_column: str | None = argument(
        None, "Column of masks, images of what counts in the loss (white); in folders a.mask.png is the mask of a.png."
    )
    pair_column: str | None = argument(
        None, "Column of names: rows of several contexts with the same one show one sample, as before and after."
    )
    paired_files: bool = argument(
        False, "Of folders: files of the same name in several contexts show one sample, as before and after."
    )
    class_column: str | None = argument(None, "Column of the classes, for class-conditional bases.")
    num_frames: int | None = argument(
        None,
        "Frames of a clip, for bases of videos: the first ones of each video. Folders of images inside of a context's "
        "folder are then clips, too. By default the base's, and 1 where the data are images.",
    )


@dataclass
class TextDataArguments(ContextDataArguments):
    """Where interventional texts are and how they are read."""

    text_column: str = argument("text", "Column of the texts; not where rows have messages, or prompt and completion.")


@dataclass
class ImageReadingArguments:
    """How a base reads images, where their files do not say."""

    resolution: int | None = argument(None, "Side of the images in pixels; by default the base's.")
    instance_prompt: str = argument("", "Caption of images that have none, for bases that take text.")


@dataclass
class TextReadingArguments:
    """How much of texts a model reads, and what of it is learned."""

    max_length: int | None = argument(
        None, "Tokens per row; longer texts are cut. By default 1024, or what the model allows."
    )
    completion_only_loss: bool | None = argument(
        None, "Learn the completions only; by default where the data has prompts, unless it is false."
    )
    assistant_only_loss: bool = argument(False, "Of messages, learn all turns of the assistant, and nothing else.")


@dataclass
class AnyDataArguments(DataArguments, TextDataArguments):
    """Where interventional data is, images or texts: folders are what they hold; and a base to compare it with."""

    text_column: str = argument("", "Column of the texts, where a dataset holds texts.")
    pretrained_model_name_or_path: str | None = argument(
        None, "A base, as a folder or a Hub id: says how far it is from the observational set."
    )


@dataclass
class ComparedDataArguments(AnyDataArguments, ImageReadingArguments, TextReadingArguments):
    """Where interventional data is, and how a base that it is compared with reads it: as in its training."""

    revision: str | None = argument(None, "Revision of the base on the Hub.")
    variant: str | None = argument(None, "Variant of the base's files, such as fp16.")


def check_apart(arguments: ContextDataArguments) -> None:
    """Refuse to write into the data, of which what is written would be a part from then on (ValueError)."""
    source, output = arguments.train_data_dir or arguments.dataset_name, getattr(arguments, "output_dir", None)
    if source is None or not output or not Path(source).is_dir():
        return
    if Path(output).resolve().is_relative_to(Path(source).resolve()):
        raise UserValueError(
            f"--output_dir: {output} is in the folder of the data, {source}: what is written there would be read as "
            "data by the next command. Choose a folder beside it."
        )


def check_source(arguments: ContextDataArguments) -> None:
    """Refuse options that do not name one source of data.

    Raises:
        ValueError: for none or two sources, or options that another source would need.
        FileNotFoundError: for a folder that does not exist.
    """
    folder, dataset = arguments.train_data_dir, arguments.dataset_name
    if (folder is None) == (dataset is None):
        received = "neither" if folder is None else f"{folder!r} and {dataset!r}, which is one too many"
        raise UserValueError(
            "Give the data as either --train_data_dir (a folder with one sub-folder per context) or --dataset_name (a "
            f"dataset with a column of contexts); received {received}."
        )
    if arguments.attribute_rules and (folder is not None or arguments.concepts is not None):
        raise UserValueError(
            "--attribute_rules make contexts and concepts from the columns of a dataset: they go with --dataset_name, "
            "and without --train_data_dir and --concepts."
        )
    if folder is None:
        return
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"--train_data_dir: {folder!r} is not a folder. Give the folder that holds one folder per context, such as "
            f"'{arguments.observational_name}', 'thick' and 'thick+slant'."
        )
    for name, unset in _OF_DATASETS.items():
        value = getattr(arguments, name, unset[0])
        if value not in unset:
            raise UserValueError(
                f"--{name}={value!r} is for datasets, and has no effect beside --train_data_dir. Leave one of them out."
            )
