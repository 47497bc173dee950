"""Errors that are the user's to mend: the command line prints them without a traceback, and anything else with one."""

from __future__ import annotations


class UserError(Exception):
    """Something that was passed, or is on this machine, cannot be used; the message says what, and what to do."""


class UserValueError(UserError, ValueError):
    """A value that cannot be used."""


class UserTypeError(UserError, TypeError):
    """A value of a type that cannot be used."""


class MissingPackageError(UserError, ImportError):
    """A package that has to be installed for this."""
