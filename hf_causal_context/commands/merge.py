"""`hf-causal-context merge`: the base with one context in its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..data.arguments import argument, refuse_useless
from .adapter_arguments import CALIBRATED, RevisionArguments, parse_contexts


@dataclass(kw_only=True)
class Arguments(RevisionArguments):
    """Settings of the command."""

    context: str = field(
        metadata={"help": 'One, such as a+b or "a=0.5,b=-1"; obs is the empty one.', "aliases": ["--contexts"]}
    )
    output_dir: Path = field(metadata={"help": "Folder for the merged base."})
    calibrated: bool = argument(False, CALIBRATED)
    variant: str | None = argument(None, "Of the base's files, such as fp16.")
    observational_name: str = argument("obs", "What the empty context is called.")


def run(arguments: Arguments) -> None:
    """Write the folder, and say where it is; see `write_merged` for what it raises."""
    from ..inference.merging import write_merged

    stored = arguments.open()
    if stored.is_of_language_model:
        refuse_useless(arguments, ["variant"], f"{arguments.adapter} is an adapter of a language model")
    contexts = parse_contexts([arguments.context], arguments.observational_name)
    [context] = stored.meant(contexts, arguments.calibrated)
    write_merged(stored, context, arguments.output_dir, variant=arguments.variant, **arguments.weights)
    print(f"The base with {arguments.context} in its weights is in {arguments.output_dir}.")
