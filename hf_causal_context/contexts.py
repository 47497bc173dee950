"""Names <-> masks: the vocabulary of concepts and the contexts that intervene on them.

Shapes: B rows (samples), K concepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ._files import in_one_spelling
from .errors import UserTypeError, UserValueError
from .messages.wording import nearest, quoted, short_repr

RESERVED_CHARACTERS = "+=,"
OBSERVATIONAL = "observational"  # the name, in contexts, of the strength of an adapter's observational part
OBS = "obs"  # what texts call the empty context; a concept of that name, which old adapters may have, is "obs=1"
MAX_CONCEPTS = 1_000
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
        return cls() if text.strip() == OBS else cls(*({name: strength} for name, strength in _parsed(text)))

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


@dataclass(frozen=True)
class ConceptSet:
    """The concepts of one adapter, in their fixed order.

    Raises:
        TypeError: for a name that is not a string.
        ValueError: for no names or more than MAX_CONCEPTS, duplicates, or names that are empty, padded, too long,
            unprintable or contain "+", "=" or ",".

    Example:
        >>> ConceptSet(("thick", "slant")).mask([Context("slant"), Context({"thick": 0.5})])
        tensor([[0.0000, 1.0000],
                [0.5000, 0.0000]])
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not isinstance(self.names, Iterable):
            raise UserTypeError(
                f"concepts={short_repr(self.names)} must be a sequence of names, such as ('thick', 'slant')."
            )
        object.__setattr__(self, "names", tuple(islice(self.names, MAX_CONCEPTS + 1)))
        if not self.names:
            raise UserValueError("No concepts given. Name at least one, for example concepts=('thick', 'slant').")
        if len(self.names) > MAX_CONCEPTS:
            raise UserValueError(f"More than {MAX_CONCEPTS:,} concepts given. Divide them among several adapters.")
        object.__setattr__(self, "names", tuple(map(_checked_name, self.names)))
        if OBSERVATIONAL in self.names:
            raise UserValueError(
                f"{OBSERVATIONAL!r} cannot be the name of a concept: in contexts it is the strength of the adapter's "
                f"observational part, as in '{OBSERVATIONAL}=0.5+thick'. Rename the concept."
            )
        duplicates = [name for name, count in Counter(self.names).items() if count > 1]
        if duplicates:
            raise UserValueError(f"Duplicate concepts: {quoted(duplicates)}. Every concept needs a name of its own.")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and in_one_spelling(name) in self.names

    def index(self, name: str, where: str = "") -> int:
        """Position of a concept; ValueError for an unknown name, and `where` says in what it occurred."""
        try:
            return self.names.index(in_one_spelling(name))
        except ValueError:
            words = name.split()
            meant = ["+".join(words)] if set(words) <= set(self.names) else self.names
            raise UserValueError(
                f"Unknown concept {name!r}{f' in {where}' if where else ''}. Known concepts: {quoted(self.names)}."
                f"{nearest(name, meant)} Correct the name, or add it to the concepts."
            ) from None

    def check_words(self, names: Iterable[str], words: Iterable[str]) -> None:
        """Refuse names that are almost one of the words for several contexts (ValueError), such as 'pair'."""
        allowed = (*words, *self)
        for name in names:
            plain = not set(RESERVED_CHARACTERS).intersection(name)
            if plain and name not in allowed and nearest(name, words):
                raise UserValueError(f"Unknown context {name!r}.{nearest(name, allowed)} Allowed: {quoted(allowed)}.")

    def mask(self, contexts: Sequence[Context]) -> Tensor:
        """Intervention mask (B, K), float32 on the CPU: 0 not intervened, 1 intervened, other values are strengths.

        Raises:
            ValueError: for a concept that is not in this set, or another strength of the observational part than 1,
                which a mask has no column for: see `strengths`.
        """
        for context in contexts:
            if context.observational != 1:
                raise UserValueError(
                    f"Context {str(context)!r} sets the strength of the observational part, which belongs to an "
                    "adapter at inference, not to data or masks. Leave it out here."
                )
        return self.strengths(contexts)[:, 1:].contiguous()

    def strengths(self, contexts: Sequence[Context]) -> Tensor:
        """Strengths (B, 1 + K), float32 on the CPU: of the observational part, then of the concepts as in `mask`.

        Raises:
            ValueError: for a concept that is not in this set.
        """
        rows = [[context.observational, *[0.0] * len(self)] for context in contexts]
        for row, context in zip(rows, contexts, strict=True):
            for name, strength in context.strengths.items():
                row[1 + self.index(name, f"context {str(context)!r}")] = strength
        return torch.tensor(rows, dtype=torch.float32).view(-1, 1 + len(self))

    def contexts(self, mask: Tensor) -> tuple[Context, ...]:
        """Return the context of every row of a mask (B, K), or of strengths (B, 1 + K); the inverse of the two."""
        names = self.names if mask.shape[1] == len(self) else (OBSERVATIONAL, *self.names)
        return tuple(Context(dict(zip(names, row, strict=True))) for row in mask.tolist())

    def check_mask(self, mask: Tensor) -> Tensor:
        """Return a mask (B, K) as it is, and (K,) as (1, K).

        Raises:
            TypeError: for a dtype that is not floating point.
            ValueError: for another shape, the meta device, or values that are not finite.
        """
        if not mask.is_floating_point():
            raise UserTypeError(
                f"The intervention mask has dtype {mask.dtype}; it must be floating point. Call .float()."
            )
        if mask.ndim not in (1, 2) or mask.shape[-1] != len(self) or mask.shape[0] == 0:
            raise UserValueError(
                f"The intervention mask has shape {tuple(mask.shape)}; it must be (rows, {len(self)}), one column for "
                f"each of the concepts {quoted(self.names)}."
            )
        if mask.device.type == "meta":
            raise UserValueError("The intervention mask lies on the device 'meta'. Move it to the device of the model.")
        # A value check waits for the device and cannot be part of a compiled graph.
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(mask).all()):
            raise UserValueError(
                "The intervention mask contains NaN or infinite values. Strengths must be finite numbers."
            )
        return mask if mask.ndim == 2 else mask[None]


def _strength_items(part: object) -> Iterator[tuple[str, float]]:
    if isinstance(part, Context):
        yield from part._strengths.items()
    elif isinstance(part, str):
        yield _checked_name(part), 1.0
    elif isinstance(part, Mapping):
        for name, strength in part.items():
            name = _checked_name(name)
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


def _checked_name(name: object) -> str:
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


def _parsed(text: str) -> Iterator[tuple[str, float]]:
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
    if isinstance(value, str) and (zero := [name for name, s in _parsed(value) if s == 0 and name != OBSERVATIONAL]):
        raise UserValueError(
            f"The context {value!r} names {zero[0]!r} at strength 0, which is no intervention. Leave the name out; "
            f"rows with no other are observational: call them {observational_name!r}."
        )
    if context.observational != 1:
        raise UserValueError(
            f"The context {str(context)!r} of the data sets the strength of the observational part, which is for "
            "inference only: all data belong to the observational world. Leave it out."
        )
    return str(context)
