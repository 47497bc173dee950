"""The command `hf-causal-context`: finds the command, parses its arguments, and runs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .commands import COMMANDS
from .errors import FULL_DISK, UserError, is_full_disk
from .messages.wording import in_options, nearest

# They may stand anywhere.
_FLAGS = {
    "--quiet": "results, warnings and errors only: no messages, no progress bars",
    "--verbose": "also what transformers, diffusers, datasets and the Hub's client log",
    "--debug": "show the traceback of every error",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    What is the user's to mend is printed without a traceback, unless `--debug` is among the arguments. Anything else
    is a bug and keeps its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    quiet, verbose, debug = (flag in given for flag in _FLAGS)
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
    for flag, text in _FLAGS.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args([argument for argument in given if argument not in _FLAGS])
    if chosen.command not in COMMANDS:
        guess = nearest(chosen.command, COMMANDS)
        parser.error(f"unknown command {chosen.command!r}.{guess} Allowed: {', '.join(COMMANDS)}")
    if quiet and verbose:
        parser.error("--quiet and --verbose contradict each other. Give one of them.")
    options: list[str] = []
    try:
        command = importlib.import_module(f".commands.{chosen.command.replace('-', '_')}", __package__)
        from .commands.early_checks import check_numbers, check_places
        from .commands.parsing import option_names, parse
        from .commands.verbosity import set_verbosity

        set_verbosity(quiet, verbose)
        options = option_names(command.Arguments)
        parsed = parse(chosen.command, command.Arguments, chosen.arguments)
        check_numbers(parsed)
        check_places(parsed)
        command.run(parsed)
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'Interrupted.'}", file=sys.stderr)
        return 130
    except Exception as error:
        full = is_full_disk(error)
        if debug or not (full or isinstance(error, UserError | OSError | MemoryError)):
            raise
        said = in_options(str(error), options) or type(error).__name__
        if full and not isinstance(error, UserError):  # which says what to do
            said = f"{said.rstrip('.')}. {FULL_DISK}"
        print(f"\nerror: {said}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
