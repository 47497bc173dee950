"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; cells are Markdown."""
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def text_cell(text: str) -> str:
    """Return a text in one cell, where it can neither end the cell nor be read as HTML."""
    escaped = text.strip().replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "<br>".join(escaped.splitlines())
