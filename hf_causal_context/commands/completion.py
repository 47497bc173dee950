"""`hf-causal-context completion`: a shell script, so that the Tab key need not wait for Python."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from . import COMMANDS
from .parsing import make_parser, shown_name

_SCRIPT = """\
_hf_causal_context() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $([ "${{word#-}}" = "$word" ] && echo "${{COMP_WORDS[COMP_CWORD-1]}}")" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _hf_causal_context hf-causal-context
"""


@dataclass
class Arguments:
    """There are none."""


def run(arguments: Arguments) -> None:
    """Print the script: commands first, then options, and the values of those that have a few; else files."""
    cases = "\n".join(f'            {pattern}) words="{words}" ;;' for pattern, words in _cases())
    print(_SCRIPT.format(commands=" ".join(COMMANDS), cases=cases), end="")


def _cases() -> Iterator[tuple[str, str]]:
    """Yield patterns of a command with the option before, if there is one, and the words that may come."""
    for command in COMMANDS:
        settings = importlib.import_module(f".{command.replace('-', '_')}", __package__).Arguments
        options = {shown_name(action): action.choices for action in make_parser(command, settings)._actions}
        for name, choices in options.items():
            if choices:
                yield f'"{command} {name}"', " ".join(choices)
        yield f'"{command} "', " ".join(options)
