"""Checks of a config's fields: types and sizes, before anything is made of them.

A stored config is data from anywhere: any JSON may stand in any field, and names of modules become regular expressions.
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

from peft.config import PeftConfig

from ...errors import UserValueError
from ...messages.wording import short_repr

MAX_LIST = 5_000
MAX_PATTERNS = 256  # fewer than the expressions that `re` keeps compiled
MAX_PATTERN_LENGTH = 1_000
MAX_TEXT = 4_096
MAX_BACKTRACKING = 28  # log2 of the ways in which a regular expression may match
_KEY_BITS = 7  # log2 of the length of a module's name, roughly

# AutoPeftModel imports what `auto_mapping` names.
_IMPORTABLE = ("diffusers", "hf_causal_context", "peft", "torch", "transformers")


def check_peft_fields(config: PeftConfig) -> None:
    """Check the fields that every config of PEFT has.

    Raises:
        ValueError: for another type, or texts that could be more than a name.
    """
    for name in ("task_type", "peft_version", "base_model_name_or_path", "revision"):
        _check_text(name, getattr(config, name))
    revision = config.revision or ""
    if ".." in revision or revision.startswith("/") or "\\" in revision:
        raise UserValueError(f"revision={short_repr(revision)} must be the name of a branch or tag, or a commit.")
    check_flag("inference_mode", config.inference_mode)
    _check_auto_mapping(config.auto_mapping)


def check_flag(name: str, value: object) -> None:
    """Raise ValueError for anything but True and False."""
    if not isinstance(value, bool):
        raise UserValueError(f"{name}={short_repr(value)} must be True or False.")


def check_number(name: str, value: object, maximum: float) -> None:
    """Raise ValueError for anything but None and numbers from 0 (excluded) to `maximum`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= maximum:
        raise UserValueError(
            f"{name}={short_repr(value)} must be a positive number of at most {maximum:g}, or None for a factor of 1."
        )


def check_share(name: str, value: object) -> None:
    """Raise ValueError for anything but numbers from 0 to 1 (excluded)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserValueError(f"{name}={short_repr(value)} must be at least 0 and below 1; 0.05 is usual.")


def check_count(name: str, value: object, minimum: int, maximum: int) -> int:
    """Return a whole number; raise ValueError for anything else, or one out of bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UserValueError(f"{name}={short_repr(value)} must be a whole number of at least {minimum}.")
    if value > maximum:
        raise UserValueError(f"{name}={short_repr(value)} is too large: at most {maximum:,} is allowed.")
    return value


def check_list(name: str, value: object, content: str) -> list[Any] | tuple[Any, ...]:
    """Return a list or tuple; raise ValueError for anything else."""
    if not isinstance(value, list | tuple):
        raise UserValueError(f"{name}={short_repr(value)} must be a list of {content}.")
    return value


def check_names(name: str, value: object) -> tuple[str, ...]:
    """Return a list of texts as a tuple; raise ValueError for anything else."""
    items = check_list(name, value, "names")
    if not all(isinstance(item, str) for item in items):
        raise UserValueError(f"{name}={short_repr(value)} must hold names only.")
    return tuple(items)


def check_indices(name: str, value: object) -> None:
    """Raise ValueError for anything but None, a number of a block, or a list of them."""
    items = value if isinstance(value, list | tuple) else () if value is None else (value,)
    _check_length(name, items, MAX_LIST)
    for item in items:
        check_count(name, item, 0, 100_000)


def check_module_names(name: str, value: object, *, sets: bool = False) -> None:
    """Raise ValueError for anything but None, a regular expression, or a list (or set) of names."""
    if isinstance(value, str):
        _check_pattern(name, value)
    elif value is not None:
        if not isinstance(value, list | tuple) and not (sets and isinstance(value, set | frozenset)):
            raise UserValueError(f"{name}={short_repr(value)} must be a list of names, or one text.")
        _check_length(name, value, MAX_LIST)
        check_names(name, tuple(value))
        for item in value:
            if not item or len(item) > MAX_PATTERN_LENGTH:
                raise UserValueError(
                    f"{name} holds {short_repr(item)}: names have 1 to {MAX_PATTERN_LENGTH:,} characters."
                )
            if name == "layers_pattern":
                _check_pattern(name, item)


def check_module_paths(name: str, value: object) -> None:
    """Raise ValueError for anything but None and a list of names such as 'decoder.head'."""
    if value is None:
        return
    items = check_names(name, value)
    _check_length(name, items, MAX_LIST)
    for item in items:
        # PEFT compares them by their ends, and as regular expressions.
        if len(item) > MAX_PATTERN_LENGTH or not re.fullmatch(r"\w+(\.\w+)*", item):
            raise UserValueError(
                f"{name} holds {short_repr(item)}, which is not the name of a module, such as 'decoder.head'."
            )


def check_patterns(name: str, value: object) -> None:
    """Raise ValueError for anything but a mapping from names or regular expressions."""
    if not isinstance(value, Mapping):
        raise UserValueError(f"{name}={short_repr(value)} must be a mapping from names of modules.")
    _check_length(name, value, MAX_PATTERNS)
    for pattern in value:
        if not isinstance(pattern, str) or not pattern:
            raise UserValueError(f"{name} has the key {short_repr(pattern)}; it must be the name of a module.")
        _check_pattern(name, pattern)


def _check_length(name: str, value: Any, maximum: int) -> None:
    if len(value) > maximum:
        raise UserValueError(f"{name} has {len(value):,} entries; at most {maximum:,} are allowed.")


def _check_text(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise UserValueError(f"{name}={short_repr(value)} must be a text of at most {MAX_TEXT:,} characters.")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise UserValueError(f"{name}={short_repr(value)} must not hold control characters.")


def _check_auto_mapping(value: object) -> None:
    if value is None:
        return
    names = ("base_model_class", "parent_library")
    if not isinstance(value, dict) or set(value) != set(names):
        raise UserValueError(f"auto_mapping={short_repr(value)} must name a base_model_class and a parent_library.")
    for name in names:
        text = value[name]
        if not isinstance(text, str) or len(text) > 200 or not all(map(str.isidentifier, text.split("."))):
            raise UserValueError(f"auto_mapping: {name}={short_repr(text)} must be a dotted name of Python.")
    module = value["parent_library"]
    if module.partition(".")[0] not in _IMPORTABLE and module not in sys.modules:
        raise UserValueError(
            f"The adapter's config names the module {module!r}, which is not imported for it. If you trust that module "
            f"and have it, import it first; allowed without that are those of {', '.join(_IMPORTABLE)}."
        )


def _check_pattern(name: str, pattern: str) -> None:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise UserValueError(
            f"{name} has a regular expression of {len(pattern):,} characters; at most {MAX_PATTERN_LENGTH:,} are "
            "allowed. Give a list of names instead."
        )
    try:
        re.compile(f"({pattern})")
        bits = _backtracking(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserValueError(f"{name}={short_repr(pattern)} is not a valid regular expression: {error}.") from error
    if bits > MAX_BACKTRACKING:
        raise UserValueError(
            f"{name}={short_repr(pattern)} could take for ever to match: it repeats what can be repeated, or too much. "
            "Give a list of names instead."
        )


def _backtracking(pattern: str) -> float:
    """Return an upper bound for log2 of the ways in which a regular expression may match the name of a module."""
    # From its text alone, since Python has no public parser of regular expressions. Escapes and sets of characters are
    # single characters; then groups are folded from the inside to the outside. Comments could hide parts of it.
    if re.search(r"\(\?(#|[a-zA-Z-]*x)", pattern):
        return math.inf
    text = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    text = re.sub(r"\[\^?\]?[^\]]*\]", "x", text)
    text = re.sub(r"\(\?(?:P?<?\w*>|[:=!]|<[=!]|[aiLmsux-]*:)", "(", text)
    ways: list[list[float]] = [[0.0]]  # of each open group, log2 for each of its alternatives
    closed = 0.0  # of what a following quantifier would repeat
    for token in re.findall(r"\{\d*,?\d*\}\??|[*+?][?+]?|.", text, flags=re.DOTALL):
        if token == "(":
            ways.append([0.0])
        elif token == ")" and len(ways) > 1:
            closed = _log2_sum(ways.pop())
            ways[-1][-1] += closed
            continue
        elif token == "|":
            ways[-1].append(0.0)
        elif token[0] in "*+{" and token != "{":
            ways[-1][-1] += _KEY_BITS + closed * 2**_KEY_BITS
        elif token[0] == "?":
            ways[-1][-1] += 1
        if ways[-1][-1] > MAX_BACKTRACKING:
            return math.inf
        closed = 0.0
    return max(_log2_sum(group) for group in ways)


def _log2_sum(logarithms: list[float]) -> float:
    largest = max(logarithms)
    return largest + math.log2(sum(2.0 ** (value - largest) for value in logarithms))
