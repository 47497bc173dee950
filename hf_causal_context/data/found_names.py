"""Concepts that nobody named, but that data seem to have: a folder's name may mean something else."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..errors import UserValueError
from ..messages.wording import quoted

_OBSERVATIONAL = ("obs", "observation", "observations")
_DECIMAL = re.compile(r"(.+?)[ _:@-]?(-?\d*\.\d+)")  # "weight_0.5", or "weight-0.5"
_REPEATS = re.compile(r"\d+_(.+)")  # kohya's "10_hat": each image ten times


def check_found_names(names: Iterable[str], observational_name: str, has_observational: bool) -> None:
    """Ask about names that may mean something else; whoever names all concepts is not asked.

    Nothing is guessed: a name is stored in the adapter for good, and "observation" may well be a concept.

    Raises:
        ValueError: for names that differ in capitals only, that look like the observational set, like kohya's, or like
            a strength of another concept.
    """
    names = list(names)
    _check_strengths(names)
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_folded(name)].append(name)
    plain = _folded(observational_name)
    for folded, same in alike.items():
        if len(same) > 1:
            raise UserValueError(
                f"{quoted(same)} differ in capitals only. If they are one concept, give them one name; if not, name "
                "all concepts: concepts=."
            )
        if folded == plain or (folded in _OBSERVATIONAL and not has_observational):
            raise UserValueError(
                f"{same[0]!r} looks like the observational set, which is called {observational_name!r} here. If it is, "
                f"rename it, or give observational_name= (--observational_name {same[0]}); if it is a concept, name "
                "all concepts: concepts=."
            )
        if repeats := _REPEATS.fullmatch(same[0]):
            raise UserValueError(
                f"{same[0]!r} looks like a folder of kohya's scripts, with a number of repeats. Batches hold all "
                f"contexts equally often here, without repeats: rename it to {repeats[1]!r}. If the number belongs to "
                "the concept's name, name all concepts: concepts=."
            )


def _check_strengths(names: Sequence[str]) -> None:
    stems = {name: match for name in names if (match := _DECIMAL.fullmatch(name))}
    for name, match in stems.items():
        if match[1] in names or sum(other[1] == match[1] for other in stems.values()) > 1:
            raise UserValueError(
                f"{name!r} looks like the concept {match[1]!r} at strength {match[2]}. If it is, rename it to "
                f"'{match[1]}={match[2]}'; if it is a concept of its own, name all concepts: concepts=."
            )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
