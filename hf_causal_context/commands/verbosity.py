"""How much a command says: `--quiet` and `--verbose`."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec

from ..messages.progress import set_quiet

# Libraries that say something of their own -> where their progress bars are switched off.
_LIBRARIES = {
    "transformers": "transformers.utils.logging.disable_progress_bar",
    "diffusers": "diffusers.utils.logging.disable_progress_bar",
    "datasets": "datasets.utils.disable_progress_bars",
    "huggingface_hub": "huggingface_hub.utils.disable_progress_bars",
}


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Let commands say results, warnings and errors only, or also what the libraries log, from now on."""
    set_quiet(quiet)
    if verbose:
        logging.basicConfig(level=logging.INFO)
    if not quiet and not verbose:
        return
    for library, switch in _LIBRARIES.items():
        if find_spec(library) is None:
            continue
        logs = import_module(f"{library}.utils.logging")
        if verbose:
            logs.set_verbosity_info()
        else:
            logs.set_verbosity_warning()
            module, _, function = switch.rpartition(".")
            getattr(import_module(module), function)()
