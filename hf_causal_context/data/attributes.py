"""Contexts from attribute columns, by rules such as ``Smiling == 1 and Eyeglasses == 0``."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Number
from typing import Any, TypeAlias

from datasets import Dataset

from ..contexts import ConceptSet, Context, ContextLike
from ..errors import UserValueError
from ..messages.wording import quoted
from .columns import Rows, has_no_label, known_features, require_columns, with_text_column
from .interventional import InterventionalData, from_dataset
from .texts import texts_from_dataset

SELECTION_WARNING = (
    "Contexts are made by selecting rows, and selecting is not intervening. An intervention do(x) would leave all "
    "other causes as they are; selected rows also differ in every attribute that goes along with x. The adapter may "
    "learn those too, and compositions may inherit them. Balance the correlated attributes by stricter rules, or "
    "prefer sets that were made by changing one thing."
)

Row: TypeAlias = Mapping[str, Any]
Predicate: TypeAlias = Callable[[Row], Any]

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def contexts_from_attributes(dataset: Rows, rules: Mapping[str, str], context_column: str = "context") -> Rows:
    """Add a column of contexts: the concepts whose rules a row fulfils; none is observational.

    Rules hold column names, numbers, text in quotes, the comparisons ``== != < <= > >=``, ``and``, ``or``, ``not`` and
    parentheses. Warns that selecting rows is not intervening.

    Raises:
        ValueError: for a rule that cannot be read, an unknown column, a dataset that has the context column already, a
            comparison that is not defined, a row without a value that its context depends on, or (not for streams) a
            rule that no row fulfils.
    """
    concepts = ConceptSet(tuple(rules))
    dataset, features = known_features(dataset)
    if context_column in features:
        raise UserValueError(
            f"The dataset has a column {context_column!r} already. Leave the rules out to use it, or give the contexts "
            "that they make another name: context_column=."
        )
    parsed = {concept: _parse_rule(concept, rules[concept]) for concept in concepts}
    columns = sorted({column for _, names in parsed.values() for column in names})
    for concept, (_, names) in parsed.items():
        require_columns(features, dict.fromkeys(sorted(names), f"rule of {concept!r}"))
    unfulfilled = set(concepts)

    def context(*values: Any) -> str:
        row = {
            column: None if has_no_label(features[column], value) else value
            for column, value in zip(columns, values, strict=True)
        }
        targets = [concept for concept, (holds, _) in parsed.items() if _apply(concept, holds, row)]
        unfulfilled.difference_update(targets)
        return str(Context(*targets))

    rows = with_text_column(dataset, context_column, columns, context)
    if isinstance(rows, Dataset) and unfulfilled:
        concept = min(unfulfilled)
        raise UserValueError(
            f"No row fulfils the rule of {concept!r}: {rules[concept]!r}. Compare it with the values of the columns "
            f"{quoted(sorted(parsed[concept][1]))}."
        )
    warnings.warn(SELECTION_WARNING, UserWarning, stacklevel=2)
    return rows


def from_attributes(
    dataset: Rows,
    rules: Mapping[str, str],
    *,
    context_column: str = "context",
    content_column: str = "image",
    caption_column: str | None = None,
    mask_column: str | None = None,
    pair_column: str | None = None,
    observational_name: str = "obs",
    held_out_contexts: Iterable[ContextLike] = (),
    training_contexts: Iterable[ContextLike] | None = None,
) -> InterventionalData:
    """`contexts_from_attributes`, then `from_dataset`; the concepts are those of the rules, in their order.

    Raises:
        ValueError: what both raise.
    """
    data = from_dataset(
        contexts_from_attributes(dataset, rules, context_column),
        concepts=tuple(rules),
        context_column=context_column,
        content_column=content_column,
        caption_column=caption_column,
        mask_column=mask_column,
        pair_column=pair_column,
        observational_name=observational_name,
        held_out_contexts=held_out_contexts,
        training_contexts=training_contexts,
    )
    return replace(data, warnings=(SELECTION_WARNING, *data.warnings))


def texts_from_attributes(
    dataset: Rows,
    rules: Mapping[str, str],
    *,
    context_column: str = "context",
    text_column: str = "text",
    observational_name: str = "obs",
    held_out_contexts: Iterable[ContextLike] = (),
    training_contexts: Iterable[ContextLike] | None = None,
) -> InterventionalData:
    """`contexts_from_attributes`, then `texts_from_dataset`; the concepts are those of the rules, in their order.

    Raises:
        ValueError: what both raise.
    """
    data = texts_from_dataset(
        contexts_from_attributes(dataset, rules, context_column),
        concepts=tuple(rules),
        context_column=context_column,
        text_column=text_column,
        observational_name=observational_name,
        held_out_contexts=held_out_contexts,
        training_contexts=training_contexts,
    )
    return replace(data, warnings=(SELECTION_WARNING, *data.warnings))


def _parse_rule(concept: str, text: str) -> tuple[Predicate, set[str]]:
    try:
        tree = ast.parse(text.strip(), mode="eval")
        predicate = _condition(tree.body)
    except (SyntaxError, ValueError) as error:
        reason = "it is not a condition" if isinstance(error, SyntaxError) else str(error)
        raise UserValueError(
            f"The rule of {concept!r} cannot be read: {text!r}: {reason}. Allowed are comparisons of columns with "
            "numbers or quoted text, joined by and, or, not, such as Smiling == 1 and Eyeglasses == 0. Rename columns "
            "that are not plain names."
        ) from None
    return predicate, {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _apply(concept: str, predicate: Predicate, row: Row) -> bool:
    try:
        return bool(predicate(row))
    except _MissingError as error:
        raise UserValueError(
            f"The rule of {concept!r} needs the column {str(error)!r}, which is empty here, so nobody knows the row's "
            "context. Fill it in, or remove such rows by dataset.filter."
        ) from None
    except TypeError as error:
        raise UserValueError(f"The rule of {concept!r} cannot be applied to {dict(row)!r}: {error}.") from None


class _MissingError(Exception):
    """A row has nothing in a column of this name."""


def _condition(node: ast.expr) -> Predicate:
    match node:
        case ast.BoolOp(op=joined, values=nodes):
            conditions = [_condition(part) for part in nodes]
            join = all if isinstance(joined, ast.And) else any
            return lambda row: join(condition(row) for condition in conditions)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            negated = _condition(inner)
            return lambda row: not negated(row)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
            values = [_value(part) for part in (left, *others)]
            compare = [_COMPARISONS[type(op)] for op in ops]
            return lambda row: all(
                _compared(holds, before(row), after(row))
                for holds, before, after in zip(compare, values[:-1], values[1:], strict=True)
            )
    raise UserValueError(f"{ast.unparse(node)!r} is not a comparison")


def _compared(holds: Callable[[Any, Any], bool], before: Any, after: Any) -> bool:
    kinds = [Number if isinstance(value, Number) else type(value) for value in (before, after)]
    if kinds[0] is not kinds[1]:  # to Python, 1 is just not '1', in every row
        raise TypeError(f"{before!r} and {after!r} are of two types; quotes are for text, not for numbers")
    return holds(before, after)


def _of_column(column: str, row: Row) -> Any:
    value = row[column]
    if value is None or value != value:  # NaN
        raise _MissingError(column)
    return value


def _value(node: ast.expr) -> Predicate:
    match node:
        case ast.Name(id=column):
            return partial(_of_column, column)
        case ast.Constant(value=bool() | int() | float() | str() as literal):
            return lambda row: literal
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return lambda row: -number
    raise UserValueError(f"{ast.unparse(node)!r} is neither a column nor a number nor quoted text")
