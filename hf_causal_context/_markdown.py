"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_CELL_END, _ESCAPED = re.compile(r"(?<!\\)\|"), r"\\|"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; cells are Markdown, in which names of concepts may hold the mark that ends a cell."""
    yield _line(header)
    yield "|" + "---|" * len(header)
    yield from map(_line, rows)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_CELL_END.sub(_ESCAPED, cell) for cell in cells)} |"


def text_cell(text: str) -> str:
    """Return a text in one cell, where it can neither end the cell nor be read as HTML."""
    escaped = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "<br>".join(escaped.splitlines())
