"""What an adapter calls its base: the id of a repository, a folder, or a base that comes with this package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from .._files import first_line

_PACKAGE = Path(str(files("hf_causal_context")))
_PACKAGED = "hf_causal_context/models/"

# What pipelines call their denoisers.
DENOISERS = ("unet", "transformer", "transformer_2")


def is_packaged(name: str) -> bool:
    """Whether it comes with this package, such as `hf_causal_context/models/digit_base`."""
    return name.startswith(_PACKAGED) and (_PACKAGE.parent / name).resolve().parent == _PACKAGE / "models"


def is_folder(name: str) -> bool:
    """Whether it is a folder of a machine: absolute, or relative and beginning with a dot."""
    return Path(name).is_absolute() or name.startswith(".")


def check_there(name: str) -> None:
    """Refuse the name of a folder that does not exist, which the Hub need not be asked for.

    Raises:
        FileNotFoundError: naming it.
    """
    if (is_folder(name) or name.startswith("~") or name.count("/") > 1) and not Path(unpacked(name)).exists():
        raise FileNotFoundError(
            f"There is no base {name!r}: such a folder does not exist. Give a folder that does, or the id of a "
            "repository on the Hub, user/name."
        )


def why_unread(name: str, error: Exception) -> str:
    """Return why a base could not be read, on one line."""
    if Path(unpacked(name)).exists():
        return str(error)
    return f"There is no such folder here, and the Hub could not be asked or does not have it ({first_line(error)})."


def unpacked(name: str) -> str:
    """Return the folder of a base that comes with this package, wherever that is installed; any other name as it is."""
    return str(_PACKAGE.parent / name) if is_packaged(name) else name


def resolve_base_name(name: str) -> str:
    """Return a name that means the same wherever the adapter is used on this machine: folders become absolute."""
    folder = Path(unpacked(name))
    if not folder.exists():
        return name
    folder = folder.resolve()
    return f"{_PACKAGED}{folder.name}" if folder.parent == _PACKAGE / "models" else str(folder)


def portable_base_name(name: str) -> str:
    """Return a name that says nothing of the machine: of a folder only ./ and its own name."""
    name = resolve_base_name(name)
    return f"./{Path(name).name}" if is_folder(name) else name
