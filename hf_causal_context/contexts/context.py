"""What a context is, and how it is written: names of concepts, each with a strength."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import TypeAlias, cast

import torch
from torch import Tensor

from .._files import in_one_spelling
from ..errors import UserTypeError, UserValueError
from ..messages.wording import short_repr

RESERVED_CHARACTERS = "+=,"
OBSERVATIONAL = "observational"  # the name, in contexts, of the strength of an adapter's observational part
OBS = "obs"  # what texts call the empty context; a concept of that name, which old adapters may have, is "obs=1"
MAX_NAME_LENGTH = 100
MAX_STRENGTH = torch.finfo(torch.float32).max  # the dtype of masks
# Letters and symbols by their category, but they show as nothing (fillers of Hangul and Khmer, an empty Braille cell).
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


class Context:
    """A data regime: the concepts intervened on, each with a strength. Immutable; the empty one is observational.

    Arguments are names (strength 1), mappings name -> strength, or other contexts; they are composed. Strength 0 is no
    intervention, so such concepts are left out.

    `observational` is the strength of the adapter's observational part, also written as a name in texts and mappings:
    1 is the world of the data, 0 that of the base model. It is not a concept, and 1 is left out.

    Raises:
        TypeError: for anything else than names, mappings and contexts.
        ValueError: for a strength that is not finite, or one concept with two strengths.

    Example:
        >>> Context("thick") | Context({"slant": 0.5})
        Context('slant=0.5+thick')
        >>> Context("thick") | Context("slant") == Context("slant", "thick")
        True
        >>> Context("thick", observational=0)
        Context('observational=0.0+thick')
    """

    __slots__ = ("_strengths",)
    _strengths: dict[str, float]

    def __init__(self, *parts: str | Mapping[str, float] | Context, observational: float | None = None) -> None:
        strengths: dict[str, float] = {}
        for part in parts if observational is None else (*parts, {OBSERVATIONAL: observational}):
            for name, strength in _strength_items(part):
                if strengths.setdefault(name, strength) != strength:
                    raise UserValueError(
                        f"Concept {name!r} has two strengths in one context: {strengths[name]:g} and {strength:g}. "
                        "Give it one."
                    )
        # Sorted, so that composing commutes down to the printed form.
        # What is not mentioned has the strength 1 if it is the observational part, else 0.
        kept = {name: s for name, s in sorted(strengths.items()) if s != float(name == OBSERVATIONAL)}
        object.__setattr__(self, "_strengths", kept)

    @classmethod
    def parse(cls, text: str) -> Context:
        """Read ``"thick+slant"``, ``"thick=1,slant=0.5"``, or ``"obs"`` or ``""`` (observational).

        Raises:
            ValueError: for an empty name or a strength that is not a number.

        Example:
            >>> Context.parse("thick=0.5,slant").strengths
            {'slant': 1.0, 'thick': 0.5}
        """
        return cls() if text.strip() == OBS else cls(*({name: strength} for name, strength in parse_items(text)))

    @property
    def strengths(self) -> dict[str, float]:
        """Name -> strength of every target, in alphabetical order (a copy)."""
        return {name: s for name, s in self._strengths.items() if name != OBSERVATIONAL}

    @property
    def observational(self) -> float:
        """Strength of the observational part; 1 unless it was given."""
        return self._strengths.get(OBSERVATIONAL, 1.0)

    @property
    def targets(self) -> tuple[str, ...]:
        """The concepts this context acts on, in alphabetical order."""
        return tuple(self.strengths)

    def __or__(self, other: Context) -> Context:
        if not isinstance(other, Context):
            return NotImplemented
        return Context(self, other)

    def __bool__(self) -> bool:
        """Whether it differs from the observational context, (): in its targets, or in the observational part."""
        return bool(self._strengths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and self._strengths == other._strengths

    def __hash__(self) -> int:
        return hash(tuple(self._strengths.items()))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"A Context is immutable; build a new one instead of setting {name!r}.")

    def __reduce__(self) -> tuple[type[Context], tuple[dict[str, float]]]:
        return Context, (self._strengths,)

    def __str__(self) -> str:
        text = "+".join(name if s == 1 else f"{name}={s!r}" for name, s in self._strengths.items())
        return f"{OBS}=1.0" if text == OBS else text

    def __repr__(self) -> str:
        return f"Context({str(self)!r})" if self else "Context()"


# One context: a Context, "thick+slant", {"thick": 0.5} or ("thick", "slant").
ContextLike: TypeAlias = Context | str | Mapping[str, float] | tuple[str, ...] | frozenset[str]
# A context for the whole batch, a list with one context per sample, or a mask (B, K).
ContextBatch: TypeAlias = ContextLike | Sequence[ContextLike] | Tensor


def as_context(value: object) -> Context:
    """Turn a name, ``"a+b"``, a mapping name -> strength, or a tuple or set of names into a `Context`.

    Raises:
        TypeError: for any other type.
    """
    match value:
        case Context():
            return value
        case str():
            return Context.parse(value)
        case Mapping():
            return Context(value)
        case tuple() | list() | set() | frozenset():
            return Context(*value)
        case _:
            raise UserTypeError(
                f"{short_repr(value)} of type {type(value).__name__} is not a context. Allowed: a Context, a name "
                "such as 'thick' or 'thick+slant', a mapping to strengths, or a tuple of names; for a batch a list of "
                "them, or a float tensor (rows, number of concepts)."
            )


def as_contexts(value: object) -> tuple[Context, ...] | None:
    """Turn a list (or a tuple that does not hold names) into one `Context` per sample; None for a single context.

    Raises:
        TypeError: for elements that are not contexts.
        ValueError: for an empty list.
    """
    per_sample = isinstance(value, list) or (
        isinstance(value, tuple) and len(value) > 0 and not all(isinstance(item, str) for item in value)
    )
    if not per_sample:
        return None
    assert isinstance(value, list | tuple)
    if not value:
        raise UserValueError(
            "An empty list of contexts: a list holds one context per sample. The observational context is ()."
        )
    return tuple(as_context(item) for item in value)


def _strength_items(part: object) -> Iterator[tuple[str, float]]:
    if isinstance(part, Context):
        yield from part._strengths.items()
    elif isinstance(part, str):
        yield checked_name(part), 1.0
    elif isinstance(part, Mapping):
        for name, strength in part.items():
            name = checked_name(name)
            if not isinstance(strength, Real) or not abs(cast(float, strength)) <= MAX_STRENGTH:
                raise UserValueError(
                    f"Strength {short_repr(strength)} of concept {name!r} must be a finite number (in float32), such "
                    "as 0.5."
                )
            yield name, float(strength)
    else:
        raise UserTypeError(
            f"{short_repr(part)} of type {type(part).__name__} cannot be part of a context. Allowed: names and "
            "mappings name -> strength. Different contexts for the samples of a batch go into a list: "
            "[('thick',), {'slant': 0.5}]."
        )


def checked_name(name: object) -> str:
    """Return the name of a concept in one spelling.

    Raises:
        TypeError: for something that is not text.
        ValueError: for a name that is empty, padded, too long, not shown, or holds what separates concepts.
    """
    if not isinstance(name, str):
        raise UserTypeError(f"Concept name {short_repr(name)} is of type {type(name).__name__}; it must be a string.")
    if len(name) > MAX_NAME_LENGTH:
        raise UserValueError(
            f"Concept name {short_repr(name)} has {len(name):,} characters; allowed are {MAX_NAME_LENGTH}. Shorten it."
        )
    if not name or name != name.strip():
        raise UserValueError(f"Concept name {name!r} must not be empty or begin or end with white space.")
    if not name.isprintable() or any(character in RESERVED_CHARACTERS for character in name):
        raise UserValueError(
            f"Concept name {name!r} must not contain '+', '=', ',' or control characters: they separate concepts in "
            "contexts such as 'thick=0.5+slant'. Rename it."
        )
    if not _INVISIBLE.isdisjoint(name):
        raise UserValueError(f"Concept name {name!a} contains characters that show as nothing. Rename it.")
    return in_one_spelling(name)


def parse_items(text: str) -> Iterator[tuple[str, float]]:
    """Yield the names in a text such as "thick=0.5+slant", with their strengths, as they stand there.

    Raises:
        ValueError: for an empty name or a strength that is not a number.
    """
    for item in _split_concepts(text) if text.strip() else ():
        name, equals, number = (piece.strip() for piece in item.partition("="))
        if not name:
            raise UserValueError(f"Empty concept name in context {text!r}. Write 'name', or 'name=strength'.")
        try:
            yield name, float(number) if equals else 1.0
        except ValueError:
            raise UserValueError(
                f"Strength {number!r} of concept {name!r} in context {text!r} is not a number. Write 'thick=0.5', say."
            ) from None


def _split_concepts(text: str) -> Iterator[str]:
    # "1e+5" keeps its sign: a "+" that follows an exponent does not separate concepts.
    start = 0
    for position, character in enumerate(text):
        exponent = character == "+" and "=" in text[start:position] and text[position - 1] in "eE="
        if character in "+," and not exponent:
            yield text[start:position]
            start = position + 1
    yield text[start:]
