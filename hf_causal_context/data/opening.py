"""Opens a dataset by its name: of the Hub, of a folder of data files, or one that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from .._files import first_line
from ..errors import UserValueError
from ..messages.wording import quoted
from .columns import Rows, unformatted


def open_dataset(
    name_or_path: str, *, config_name: str | None = None, split: str = "train", streaming: bool = False
) -> Rows:
    """One split of a dataset of the Hub, of a folder of data files, or of what `save_to_disk` wrote.

    Raises:
        FileNotFoundError: for an unknown name.
        ValueError: for an unknown configuration or split, or files that cannot be read.
    """
    try:
        return _open_dataset(name_or_path, config_name, split, streaming)
    except OSError:
        raise
    except (ValueError, KeyError, DatasetsError) as error:
        why = first_line(error.__cause__ or error)
        raise UserValueError(f"The dataset {name_or_path!r} cannot be read: {why}") from error


def _open_dataset(name_or_path: str, config_name: str | None, split: str, streaming: bool) -> Rows:
    path = Path(name_or_path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        if config_name is not None:
            raise UserValueError(
                f"dataset_config_name={config_name!r} is for datasets of files, and save_to_disk wrote this one, which "
                "has no configurations. Leave it out."
            )
        saved = load_from_disk(name_or_path)
        if not isinstance(saved, Dataset) and split not in saved:
            raise UserValueError(
                f"it has no split {split!r}, only {quoted(map(str, saved))}. Save that under this name."
            )
        dataset = saved if isinstance(saved, Dataset) else saved[split]
        dataset = cast(Dataset, unformatted(dataset)).to_iterable_dataset() if streaming else dataset
    else:
        dataset = load_dataset(name_or_path, config_name, split=split, streaming=streaming)
    return cast(Rows, dataset)
