"""What the files of several contexts are called."""

from __future__ import annotations

from collections.abc import Iterable

from .._files import file_name
from ..contexts import Context
from ..errors import UserValueError


def context_files(contexts: Iterable[Context], observational_name: str = "obs") -> dict[Context, str]:
    """Return the name of each context's file, without its ending.

    Raises:
        ValueError: for two contexts that would have one file.
    """
    files: dict[Context, str] = {}
    taken: dict[str, Context] = {}
    for context in contexts:
        files[context] = file_name(str(context) or observational_name)
        other = taken.setdefault(files[context].casefold(), context)  # some file systems do not tell cases apart
        if other != context:
            raise UserValueError(
                f"The contexts {str(other)!r} and {str(context)!r} would both be written to {files[context]!r}. Write "
                "them one by one, into folders of their own."
            )
    return files
