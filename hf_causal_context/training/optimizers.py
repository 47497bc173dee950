"""Optimizers by the names of `--optimizer`, from the packages that have them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from ..errors import MissingPackageError, UserValueError
from ..messages.installation import installation
from ..messages.wording import quoted

# Name of an optimizer -> its module and class, and the package to install.
OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW", "torch"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "adafactor": ("torch.optim", "Adafactor", "torch"),
    "lion": ("lion_pytorch", "Lion", "lion-pytorch"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt"),
    "schedulefree": ("schedulefree", "AdamWScheduleFree", "schedulefree"),
}


def optimizer_by_name(
    name: str, parameters: Sequence[Any], given: Sequence[str], **settings: Any
) -> torch.optim.Optimizer:
    """Make an optimizer.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: or groups of them.
        given: further settings, as `--optimizer_args` has them.
        settings: those that have options of their own.

    Raises:
        MissingPackageError: for one whose package is not installed.
        ValueError: for settings that it does not have, or not with these values.
    """
    module, class_name, package = OPTIMIZERS[name]
    try:
        optimizer = getattr(import_module(module), class_name)
    except ImportError as error:
        raise MissingPackageError(
            f"--optimizer={name} needs {package}: pip install {package}, or all of them: {installation('optimizers')}"
        ) from error
    own = dict(_setting(each) for each in given)
    if "lr" in own:  # the groups of parameters have rates of their own, so that this one would do nothing
        raise UserValueError(f"--optimizer_args: lr={own['lr']} has an option of its own. Give --learning_rate.")
    settings |= own
    known = list(inspect.signature(optimizer).parameters)[1:]
    if unknown := settings.keys() - set(known):
        raise UserValueError(
            f"--optimizer_args: {name} has no setting {quoted(sorted(unknown))}. It has: {quoted(known)}."
        )
    try:
        return optimizer(parameters, **settings)
    except (TypeError, ValueError) as error:
        raise UserValueError(f"--optimizer_args={list(given)} does not fit {class_name}: {error}") from error


def _setting(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        form = "weight_decay=0.01 or 'betas=(0.9, 0.99)'"
        problem = f"the value {value!r} is no number, True, False, None or tuple of these" if equals else "no value"
        raise UserValueError(f"--optimizer_args: {given!r} has {problem}. Write {form}.") from None
