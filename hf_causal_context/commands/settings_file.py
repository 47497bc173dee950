"""Options of a command from a file, for `--config`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from .._messages import nearest, short_repr
from ..errors import UserValueError


def options_in(file: str, known: Iterable[str]) -> list[str]:
    """Return the options of a settings file as they would be written on the command line.

    Args:
        file: YAML, or JSON such as the `training_arguments.json` of a run: names of options (without dashes) and their
            values. null leaves an option at its default.
        known: the names that the command has.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for a file that holds something else, or names that the command does not have.
    """
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config: {file} does not exist. Give a file of options, in YAML or JSON.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserValueError(f"--config: {file} is neither YAML nor JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserValueError(
            f"--config: {file} holds {short_repr(settings)}, not options and their values, such as "
            "`learning_rate: 1.0e-4`."
        )
    known = tuple(known)
    options: list[str] = []
    for name, value in settings.items():
        if name == "judge" and value is not None:
            raise UserValueError(
                f"--config: {file} names a judge, which is code, and settings files may come from others. Give it on "
                f"the command line: --judge {value}"
            )
        if name not in known:
            raise UserValueError(
                f"--config: {file} has the unknown option {short_repr(name)}.{nearest(str(name), known)} The command's "
                "--help lists what there is."
            )
        values = value if isinstance(value, list) else [value]
        if any(isinstance(each, dict | list) for each in values):
            raise UserValueError(
                f"--config: {name} in {file} is {short_repr(value)}. Allowed is one value, or a list of values."
            )
        if isinstance(value, list) and (option := next((each for each in map(str, value) if each[:2] == "--"), None)):
            raise UserValueError(
                f"--config: {name} in {file} holds {short_repr(option)}, which would be read as an option. Write it as "
                "a line of its own, without dashes."
            )
        if isinstance(value, list):
            options += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            options.append(f"--{name}={value}")
    return options
