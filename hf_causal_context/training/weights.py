"""The shares of contexts in batches, as `--context_weights` gives them, or those of reweighted combinations."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from ..contexts import Context
from ..data import InterventionalData
from ..errors import UserValueError
from ..messages.wording import quoted
from .arguments import AdapterArguments

# Of a reweighted combination in batches, at most, beside 1 for a context with rows of its own.
REWEIGHTED_SHARE = 0.5


def batch_weights(data: InterventionalData, arguments: AdapterArguments) -> dict[str, float]:
    """Context -> weight, where it is not 1: what was given, and a share for combinations drawn from other rows.

    Raises:
        ValueError: for weights of contexts that are not trained on, or numbers that are no shares.
    """
    given = parse_weights(arguments.context_weights, arguments.observational_name)
    check_weights(given, (*data.contexts, *data.reweighted), arguments.observational_name)
    # Many combinations together count no more than the real contexts.
    share = min(REWEIGHTED_SHARE, len(data.contexts) / max(1, len(data.reweighted)))
    return dict.fromkeys(data.reweighted, share) | given


def parse_weights(items: list[str], observational_name: str) -> dict[str, float]:
    """``["obs=2", "thick+slant=0.5"]`` -> context -> weight.

    Raises:
        ValueError: for something else, or two weights of a context.
    """
    weights: dict[str, float] = {}
    for item in items:
        name, _, number = item.rpartition("=")
        try:
            context, weight = str(Context.parse("" if name == observational_name else name)), float(number)
        except ValueError:
            raise UserValueError(f"--context_weights {item!r} must be a context and a number, such as obs=2.") from None
        if context in weights:
            raise UserValueError(f"--context_weights has {context or observational_name!r} twice. Leave one of them.")
        weights[context] = weight
    return weights


def check_all_trained(given: Mapping[str, float], contexts: Collection[str], concepts: Collection[str]) -> None:
    """Refuse weights that leave out all rows in which a concept alone was intervened on: it could not be learned.

    Raises:
        ValueError: naming the concept.
    """
    for concept in concepts:
        own = [context for context in contexts if Context.parse(context).targets == (concept,)]
        if own and all(given.get(context) == 0 for context in own):
            raise UserValueError(
                f"--context_weights {' '.join(f'{context}=0' for context in own)} leaves out the set of {concept!r}, "
                "which would not be learned. Leave it out, make it small, such as 0.1, or remove the set."
            )


def check_weights(given: Mapping[str, float], contexts: Collection[str], observational_name: str) -> None:
    """Refuse weights of contexts that are not trained on, and numbers that are no shares.

    Raises:
        ValueError: naming what is wrong.
    """
    if stray := sorted(set(given) - set(contexts)):
        known = ", ".join(context or observational_name for context in contexts)
        raise UserValueError(f"--context_weights names {quoted(stray)}, which is not trained on. Contexts: {known}.")
    if not all(0 <= weight < math.inf for weight in given.values()) or not any(given.get(c, 1) for c in contexts):
        items = " ".join(f"{context or observational_name}={weight:g}" for context, weight in given.items())
        raise UserValueError(
            f"--context_weights {items} must be finite numbers, none negative and not all zero: shares of contexts in "
            "batches."
        )
