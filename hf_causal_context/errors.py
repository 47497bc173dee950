"""Errors that are the user's to mend: the command line prints them without a traceback, and anything else with one."""

from __future__ import annotations

import torch


class UserError(Exception):
    """Something that was passed, or is on this machine, cannot be used; the message says what, and what to do."""


class UserValueError(UserError, ValueError):
    """A value that cannot be used."""


class UserTypeError(UserError, TypeError):
    """A value of a type that cannot be used."""


class MissingPackageError(UserError, ImportError):
    """A package that has to be installed for this."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had too little memory."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    )
