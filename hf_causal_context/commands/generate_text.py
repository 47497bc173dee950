"""`hf-causal-context generate-text`: texts in chosen contexts, as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._files import complete_or_absent
from .._progress import ProgressBar
from ..data.arguments import argument
from ..errors import UserValueError
from .adapter_arguments import ContextArguments, RevisionArguments


@dataclass(kw_only=True)
class Arguments(RevisionArguments, ContextArguments):
    """Settings of the command."""

    prompt: str = field(metadata={"help": 'What the texts begin with; "" for nothing.'})
    output_file: Path = field(metadata={"help": "Such as texts.jsonl: a JSON line per text."})
    max_new_tokens: int = argument(60, "Length of the texts.")
    seeds: list[int] = argument([0], "One text per context and seed.")
    temperature: float | None = argument(None, "By default the model's own.")
    top_p: float | None = argument(None, "By default the model's own.")
    greedy: bool = argument(False, "The likeliest tokens instead of draws.")
    chat: bool = argument(False, "The prompt is a user's message to a chat model.")


def run(arguments: Arguments) -> None:
    """Write the file, and print its lines."""
    for row in generate_text_file(arguments):
        print(_json_line(row), end="")


def generate_text_file(arguments: Arguments) -> list[dict[str, Any]]:
    """Write one JSON line per seed and context, and return them: {"context", "seed", "prompt", "text"}.

    Of greedy texts, of which there is one per context, the "seed" is null.

    Raises:
        ValueError: for another kind of adapter, unknown concepts, or what `generate_texts` refuses.
        OSError: for an adapter or base that cannot be read, or a file that cannot be written.
    """
    from ..inference.texts import Prompt, generate_texts

    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    prompt, output_file = arguments.prompt, arguments.output_file
    if arguments.greedy and any(value is not None for value in sampling.values()):
        raise UserValueError(
            "--greedy draws nothing, so --temperature and --top_p have no effect. Leave one or the other out."
        )
    if output_file.is_dir():
        raise IsADirectoryError(f"--output_file {output_file} is a folder. Give a file in it, such as texts.jsonl.")
    contexts = arguments.parsed()
    stored = arguments.open()
    meant = stored.meant(contexts, arguments.calibrated)
    model, tokenizer = stored.language_model(meant, **arguments.weights)
    prompts: list[Prompt] = [[{"role": "user", "content": prompt}] if arguments.chat else prompt]
    rows = []
    seeds = (None,) if arguments.greedy else arguments.seeds
    for seed in ProgressBar(seeds, desc="write", unit="seed"):
        [texts] = generate_texts(
            model, tokenizer, prompts, meant, max_new_tokens=arguments.max_new_tokens, seed=seed, **sampling
        )
        rows += [
            {"context": str(context) or arguments.observational_name, "seed": seed, "prompt": prompt, "text": text}
            for context, text in zip(contexts, texts, strict=True)
        ]
    with complete_or_absent(output_file) as unfinished:
        unfinished.write_text("".join(map(_json_line, rows)), encoding="utf-8")
    return rows


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
