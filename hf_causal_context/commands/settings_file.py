"""Options of a command from a file, for `--config`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserValueError
from ..messages.wording import nearest, quoted, short_repr


def options_in(file: str, known: Mapping[str, bool]) -> list[str]:
    """Return the options of a settings file as they would be written on the command line.

    Args:
        file: YAML, or JSON such as the `training_arguments.json` of a run: names of options (without dashes) and their
            values. null leaves an option at its default.
        known: the names that the command has, and which of them take text.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for a file that holds something else, names that the command does not have or that are there twice,
            or words that YAML would change.
    """
    try:
        settings, nodes = _read(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config: {file} does not exist. Give a file of options, in YAML or JSON.") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(
            f"--config: {file} is a folder. Give a file of options, in YAML or JSON, such as the "
            "training_arguments.json of a run."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserValueError(f"--config: {file} is neither YAML nor JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserValueError(
            f"--config: {file} holds {short_repr(settings)}, not options and their values, such as "
            "`learning_rate: 1.0e-4`."
        )
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
        if known[name] and value is not None:
            _check_words(file, name, values, nodes[name])
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


def _read(file: str) -> tuple[Any, dict[str, yaml.Node]]:
    """Return what a file holds, and how each option in it is written.

    Raises:
        OSError, UnicodeDecodeError, yaml.YAMLError: for a file that cannot be read.
        ValueError: for an option that is there twice, of which YAML would take the last.
    """
    text = Path(file).read_text(encoding="utf-8")
    # JSON may be indented by tabs, and YAML not; within JSON's strings there are none.
    loader = yaml.SafeLoader(text.expandtabs() if text.lstrip().startswith("{") else text)
    root = loader.get_single_node()
    if root is None:
        return None, {}
    if isinstance(root, yaml.MappingNode):
        times = Counter(str(key.value) for key, _ in root.value)
        if twice := [name for name in times if times[name] > 1]:
            raise UserValueError(f"--config: {file} has {quoted(twice)} more than once. Leave one of them.")
    settings = loader.construct_document(root)
    return settings, {str(key.value): node for key, node in root.value} if isinstance(settings, dict) else {}


def _check_words(file: str, name: str, values: Collection[object], node: yaml.Node) -> None:
    """Refuse text that YAML reads as something else: no as False, 012 as 10 (ValueError)."""
    scalars = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for value, scalar in zip(values, scalars, strict=True):
        if not isinstance(value, str) and str(value) != scalar.value:
            raise UserValueError(
                f"--config: {name} in {file} is text, and YAML reads {scalar.value} in it as {value}. Put it in "
                f'quotes: "{scalar.value}".'
            )
