"""Errors that are the user's to mend: the command line prints them without a traceback, and anything else with one."""

from __future__ import annotations

import errno

import torch

FULL_DISK = (
    "A disk is full: that of the output, of temporary files (TMPDIR), or of what the Hub's client and datasets keep "
    "(HF_HOME). Make room there, or choose another."
)


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


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk had no space left, as the system or safetensors say it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)
