"""The settings that say where interventional data is, under the argument names of diffusers' training scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def argument(default: Any, meaning: str, **metadata: Any) -> Any:
    """Return a dataclass field with a default and a help text; metadata goes to argparse."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": meaning, **metadata})
    return field(default=default, metadata={"help": meaning, **metadata})


@dataclass
class ContextDataArguments:
    """Where interventional data is and which of its contexts are trained on."""

    train_data_dir: str | None = argument(None, "Folder with one sub-folder per context: obs/, thick/ ...")
    dataset_name: str | None = argument(None, "Instead: a dataset on the Hub or on disk with a context column.")
    dataset_config_name: str | None = argument(None, "Its configuration.")
    context_column: str = argument("context", "Column of the contexts.")
    attribute_rules: list[str] = argument(
        [], "Contexts from attribute columns instead: 'smiling: Smiling == 1 and Eyeglasses == 0' ..."
    )
    observational_name: str = argument("obs", "What the observational context is called in folders and columns.")
    concepts: list[str] | None = argument(None, "The concepts; by default those the data holds.")
    held_out_contexts: list[str] = argument([], "Contexts that are not trained on, besides all combinations.")
    training_contexts: list[str] | None = argument(
        None, "Contexts that are trained on, combinations too; by default obs and the single concepts."
    )
    context_weights: list[str] = argument([], "Shares of contexts in batches, such as obs=2 (others 1).")
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
    class_column: str | None = argument(None, "Column of the classes, for class-conditional bases.")


@dataclass
class TextDataArguments(ContextDataArguments):
    """Where interventional texts are and how they are read."""

    text_column: str = argument("text", "Column of the texts; not where rows have messages, or prompt and completion.")


@dataclass
class AnyDataArguments(DataArguments, TextDataArguments):
    """Where interventional data is, images or texts: folders are what they hold; and a base to compare it with."""

    text_column: str = argument("", "Column of the texts, where a dataset holds texts.")
    pretrained_model_name_or_path: str | None = argument(
        None, "A base, as a folder or a Hub id: says how far it is from the observational set."
    )
