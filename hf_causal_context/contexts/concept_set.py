"""The vocabulary of concepts: names <-> masks.

Shapes: B rows (samples), K concepts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .._files import in_one_spelling
from ..errors import UserTypeError, UserValueError
from ..messages.wording import nearest, quoted, short_repr
from .context import OBSERVATIONAL, RESERVED_CHARACTERS, Context, checked_name

MAX_CONCEPTS = 1_000


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
        object.__setattr__(self, "names", tuple(map(checked_name, self.names)))
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
