"""The command `hf-causal-context`: finds the command, parses its arguments, and runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ._messages import in_options, nearest
from .errors import UserError

# Each is a module of `commands` with its settings, `Arguments`, and a function `run`.
COMMANDS = {
    "quickstart": "train, compose and score an adapter on handwritten digits, in minutes on a CPU",
    "check-data": "count contexts and find what would spoil a training",
    "train": "fine-tune an adapter on a diffusers pipeline",
    "train-text": "fine-tune an adapter on a language model of transformers",
    "train-autoencoder": "train the paper's autoencoder on images in contexts",
    "info": "say what an adapter holds, and whether it fits a base",
    "generate": "make images in chosen contexts",
    "generate-text": "write texts in chosen contexts",
    "edit": "show what given images would have been in other contexts",
    "evaluate": "measure an adapter on its data: does it compose?",
    "demo": "show an adapter on a web page",
    "export": "write contexts as plain LoRA files for other tools",
    "merge": "write the base with one context in its weights",
    "push": "put an adapter on the Hub, with samples and a card",
}
_DEBUG = "--debug"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    What is the user's to mend is printed without a traceback, unless `--debug` is among the arguments. Anything else
    is a bug and keeps its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = _DEBUG in given
    parser = argparse.ArgumentParser(
        prog="hf-causal-context",
        description="LoRA for causal concepts.",
        epilog="commands:\n" + "\n".join(f"  {name:<17} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help="see below; each has a --help of its own")
    parser.add_argument(
        "--version",
        action="version",
        version=f"hf-causal-context {importlib.import_module('hf_causal_context').__version__}",
    )
    parser.add_argument(_DEBUG, action="store_true", help="show the traceback of every error")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args([argument for argument in given if argument != _DEBUG])
    if chosen.command not in COMMANDS:
        guess = nearest(chosen.command, COMMANDS)
        parser.error(f"unknown command {chosen.command!r}.{guess} Allowed: {', '.join(COMMANDS)}")
    options: list[str] = []
    try:
        command = importlib.import_module(f".commands.{chosen.command.replace('-', '_')}", __package__)
        from .commands.early_checks import check_places
        from .commands.parsing import option_names, parse

        options = option_names(command.Arguments)
        parsed = parse(chosen.command, command.Arguments, chosen.arguments)
        check_places(parsed)
        command.run(parsed)
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'Interrupted.'}", file=sys.stderr)
        return 130
    except (UserError, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"\nerror: {in_options(str(error), options) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
