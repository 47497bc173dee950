"""The command `hf-causal-context`: finds the command, parses its arguments, and runs it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence

from .errors import UserError, UserValueError

# Each is a module of `commands` with its settings, `Arguments`, and a function `run`.
COMMANDS = {
    "quickstart": "train, compose and score an adapter on handwritten digits, in minutes on a CPU",
    "train": "fine-tune an adapter on a diffusers pipeline",
    "train-text": "fine-tune an adapter on a language model of transformers",
    "train-autoencoder": "train the paper's autoencoder on images in contexts",
    "generate": "make images in chosen contexts",
    "generate-text": "write texts in chosen contexts",
    "export": "write contexts as plain LoRA files for other tools",
    "push": "put an adapter on the Hub, with samples and a card",
    "demo": "show an adapter on a web page",
    "evaluate": "measure an adapter on its data: does it compose?",
    "check-data": "count contexts and find what would spoil a training",
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
        epilog="\n".join(f"  {name:<17} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="see below; each has a --help of its own")
    parser.add_argument(_DEBUG, action="store_true", help="show the traceback of every error")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args([argument for argument in given if argument != _DEBUG])
    try:
        _run(chosen.command, chosen.arguments)
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'Interrupted.'}", file=sys.stderr)
        return 130
    except (UserError, OSError, MemoryError) as error:
        if debug:
            raise
        print(f"\nerror: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _run(name: str, arguments: list[str]) -> None:
    command = importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
    from transformers import HfArgumentParser

    from .commands.settings_file import nearest, options_in

    options = [field.name for field in dataclasses.fields(command.Arguments) if field.init]
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", metavar="FILE", help="YAML or JSON with these options; others override it.")
    usage = f"hf-causal-context {name} [--option value ...]"
    parser = HfArgumentParser(command.Arguments, usage=usage, allow_abbrev=False, parents=[files])
    file, given = files.parse_known_args(arguments)
    if file.config is not None:
        given = [*options_in(file.config, options), *given]
    parsed, *_, unknown = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    if unknown:
        guess = nearest(unknown[0].lstrip("-").partition("=")[0], options)
        raise UserValueError(
            f"Unknown arguments: {' '.join(unknown)}.{guess} hf-causal-context {name} --help lists what there is."
        )
    command.run(parsed)


if __name__ == "__main__":
    sys.exit(main())
