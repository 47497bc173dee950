"""How messages show what was received."""

from __future__ import annotations

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
