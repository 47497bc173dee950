"""Interventional data on the `datasets` library: reading, checks and sampling."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attributes import SELECTION_WARNING, contexts_from_attributes, from_attributes, texts_from_attributes
    from .checks import ContextCount, DataReport, check_data
    from .folders import load_folders
    from .interventional import InterventionalData, from_dataset
    from .opening import open_dataset
    from .sampling import ContextSampler, slots_of, stream_batches
    from .texts import load_text_folders, texts_from_dataset

__all__ = [
    "SELECTION_WARNING",
    "ContextCount",
    "ContextSampler",
    "DataReport",
    "InterventionalData",
    "check_data",
    "contexts_from_attributes",
    "from_attributes",
    "from_dataset",
    "load_folders",
    "load_text_folders",
    "open_dataset",
    "slots_of",
    "stream_batches",
    "texts_from_attributes",
    "texts_from_dataset",
]
_MODULES = ("attributes", "checks", "folders", "interventional", "opening", "sampling", "texts")


def __getattr__(name: str) -> Any:
    # The options of commands are in this package, too, and are read before `datasets` is imported.
    for module in _MODULES if name in __all__ else ():
        found = getattr(import_module(f".{module}", __name__), name, None)
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
