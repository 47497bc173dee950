"""Contexts as the rows of a dataset write them."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UserValueError
from .context import OBS, OBSERVATIONAL, Context, as_context, parse_items


def refuse_obs(names: Iterable[str]) -> None:
    """Refuse a new concept with the name of the empty context (ValueError); stored adapters may have one."""
    if OBS in names:
        raise UserValueError(
            f"A concept {OBS!r} would be hidden by the empty context, which has this name. Rename it; if it is your "
            f"observational set, leave observational_name= at {OBS!r}."
        )


def context_text(value: object, observational_name: str) -> str:
    """Return the printed form of a context as a dataset writes it: text, a list of names, or a mapping to strengths.

    Raises:
        TypeError: for another type.
        ValueError: for None, names and strengths that are not valid, 0 in a text, or one of the observational part.
    """
    if value is None:
        raise UserValueError(f"The context is missing (None). Observational rows say {observational_name!r} or ''.")
    if isinstance(value, dict):
        value = {name: strength for name, strength in value.items() if strength is not None}
    elif value == observational_name or value == [observational_name]:
        return ""
    context = Context(OBS) if value == OBS else as_context(value)
    items = parse_items(value) if isinstance(value, str) else ()
    if zero := next((name for name, s in items if s == 0 and name != OBSERVATIONAL), None):
        raise UserValueError(
            f"The context {value!r} names {zero!r} at strength 0, which is no intervention. Leave the name out; "
            f"rows with no other are observational: call them {observational_name!r}."
        )
    if context.observational != 1:
        raise UserValueError(
            f"The context {str(context)!r} of the data sets the strength of the observational part, which is for "
            "inference only: all data belong to the observational world. Leave it out."
        )
    return str(context)
