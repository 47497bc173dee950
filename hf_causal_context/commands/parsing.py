"""The options of a command: read from its command line and settings file, and listed in groups by `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..errors import UserValueError
from ..messages.wording import nearest
from .settings_file import options_in

_REQUIRED = "Required. "
_OWN = "options of this command"
# Groups in the order of --help -> their options, or the classes that these come from; others are the command's own.
_GROUPS = {
    "required": (),
    "the data": (
        *("ContextDataArguments", "DataArguments", "TextDataArguments"),
        *("ImageReadingArguments", "TextReadingArguments"),
    ),
    "the adapter and its base": ("BaseWeights", "AdapterSource", "RevisionArguments", "AdapterArguments"),
    _OWN: (),
    "sampling": ("ImageArguments",),
    "training": ("OptimizationArguments",),
    "watching and resuming": (
        *("validation_steps", "validation_contexts", "validation_prompt", "num_validation_images"),
        *("num_validation_texts", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("report_to", "logging_dir", "dry_run"),
    ),
    "the Hub": ("push_to_hub", "hub_model_id"),
    "general": ("help", "config"),
}
_TITLES = {name: title for title, names in _GROUPS.items() for name in names}


def option_names(settings: type) -> list[str]:
    """The options of a command, without dashes."""
    return [field.name for field in dataclasses.fields(settings) if field.init]


def make_parser(command: str, settings: type) -> HfArgumentParser:
    """Return the parser of a command, whose settings are a dataclass."""
    parser = _Parser(
        cast(Any, settings),
        prog=f"hf-causal-context {command}",
        allow_abbrev=False,
        parents=[_files()],
        formatter_class=_Formatter,
    )
    for action in parser._actions:
        if action.type is string_to_bool:  # transformers wants a word where the default is None
            action.nargs, action.const = "?", True
    _group(parser, settings)
    return parser


def parse(command: str, settings: type, given: Sequence[str]) -> Any:
    """Return the settings of a command, which are a dataclass, from its command line.

    An adapter may stand first, without its option.

    Raises:
        ValueError: for options that are unknown, or repeated where one would replace others, and what the settings
            refuse.
        OSError: for a settings file that cannot be read.
    """
    options = option_names(settings)
    parser = make_parser(command, settings)
    if "adapter" in options and given and not given[0].startswith("-"):
        given = ["--adapter", *given]
    _check_repeated(parser, given)
    file, given = _files().parse_known_args(given)
    if file.config is not None:
        others = {action.dest for action in parser._actions if action.type in (int, float, string_to_bool)}
        given = [*options_in(file.config, {name: name not in others for name in options}), *given]
    parsed, *_, unknown = parser.parse_args_into_dataclasses(list(given), return_remaining_strings=True)
    if unknown:
        stray = unknown[0]
        before = [word.partition("=")[0] for word in given[: given.index(stray)] if word.startswith("--")]
        if before and not stray.startswith("-"):
            guess = f" {before[-1]} takes one value, which stands in quotes if it has spaces."
        else:
            guess = nearest(stray.lstrip("-").partition("=")[0], options, prefix="--")
        raise UserValueError(
            f"Unknown arguments: {' '.join(unknown)}.{guess} hf-causal-context {command} --help lists what there is."
        )
    return parsed


def _check_repeated(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Refuse options that are there twice, where what the first ones say would be lost (ValueError)."""
    actions = {name: each for each in parser._actions for name in each.option_strings}
    used = [actions[name] for word in given if (name := word.partition("=")[0]) in actions]
    for action in used:
        if used.count(action) > 1 and action.nargs == "+":
            raise UserValueError(
                f"{shown_name(action)} is there {used.count(action)} times, and the last would replace the others. "
                f"Give all values after one: {shown_name(action)} FIRST SECOND ..."
            )
        if used.count(action) > 1 and action.dest == "config":
            raise UserValueError("--config is there more than once, and is one file. Put all options into one.")


def shown_name(action: argparse.Action) -> str:
    """Return the one spelling of an option that users are told."""
    return next(name for name in action.option_strings if name.startswith("--"))


class _Parser(HfArgumentParser):
    """Names options in errors as everywhere else: in one spelling."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"(--\w+)(?:/--[\w-]+)+", r"\1", message))


def _files() -> argparse.ArgumentParser:
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", metavar="FILE", help="YAML or JSON with these options; others override it.")
    return files


def _group(parser: argparse.ArgumentParser, settings: type) -> None:
    """Put the options into groups, those that are required first."""
    groups: dict[str, list[argparse.Action]] = {title: [] for title in _GROUPS}
    for action in parser._actions:
        required = action.required or (action.help or "").startswith(_REQUIRED)
        title = _TITLES.get(action.dest) or _TITLES.get(_origin(settings, action.dest), _OWN)
        groups["required" if required else title].append(action)
    required = [_Formatter(parser.prog).option(action) for action in groups["required"]]
    parser.usage = " ".join([parser.prog, *required, "[--option value ...]"])
    parser._action_groups.clear()
    for title, actions in groups.items():
        if actions:
            parser.add_argument_group(title)._group_actions.extend(actions)


def _origin(settings: type, name: str) -> str:
    """The class that an option comes from, which others may have changed."""
    return next((cls.__name__ for cls in reversed(settings.__mro__) if name in inspect.get_annotations(cls)), "")


class _Formatter(argparse.HelpFormatter):
    """Shows an option in one spelling, with its default."""

    def option(self, action: argparse.Action) -> str:
        """An option with the form of its value."""
        flag = shown_name(action)
        if action.nargs in (0, "?"):
            return flag
        if action.metavar or action.choices:
            value = str(action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}")
        else:
            value = {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[arg-type]
        return f"{flag} {value}{' ...' if action.nargs == '+' else ''}"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return self.option(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = (action.help or "").removeprefix(_REQUIRED), action.default
        if default is None or default is False or default in ("", [], argparse.SUPPRESS) or action.required:
            return text.replace("%", "%%")
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} Default: {shown}".replace("%", "%%")
