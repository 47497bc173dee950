"""How messages show what was received."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable


class _ShortRepr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print more than 4,300 digits.
        return super().repr_int(x, level) if x.bit_length() < 4_096 else f"<a number of {x.bit_length():,} bits>"


_SHORT = _ShortRepr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 8


def short_repr(value: object) -> str:
    """Any value as error messages show it: shortened, however long or deeply nested it is."""
    return _SHORT.repr(value)


def quoted(names: Iterable[str]) -> str:
    """Names as error messages list them."""
    return ", ".join(repr(name) for name in names)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Ask what may have been meant by an unknown name, if anything is like it; names are shown after the prefix."""
    alike = difflib.get_close_matches(name, known, cutoff=0.7)
    return f" Did you mean {' or '.join(repr(prefix + each) for each in alike)}?" if alike else ""


def in_options(message: str, options: Iterable[str]) -> str:
    """Write the arguments of Python's functions that a message names, such as `concepts=`, as options of a command."""
    known = set(options)

    def option(match: re.Match[str]) -> str:
        names = ("image_column", "text_column") if match[1] == "content_column" else (match[1],)
        written = " or ".join(f"--{name}" for name in names if name in known)
        return written + (match[2] or "") if written else match[0]

    # Not in code, nor in contexts; "=" stays where a value follows.
    return re.sub(r"`[^`]*`|(?<![-\w'\"+=,])(\w+)(?:=(?=[\s.,;:)]|$)|(=)(?!=))", option, message)
