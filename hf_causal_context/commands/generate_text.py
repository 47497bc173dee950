"""`hf-causal-context generate-text`: texts in chosen contexts, as lines of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import complete_or_absent
from ..data.arguments import argument
from ..errors import UserValueError
from ..messages.progress import ProgressBar, say
from .adapter_arguments import ContextArguments, RevisionArguments

if TYPE_CHECKING:
    from ..bases.tokens import Prompt

_SOURCES = ("prompt", "prompts_file", "messages_file")


@dataclass(kw_only=True)
class Arguments(RevisionArguments, ContextArguments):
    """Settings of the command."""

    prompt: str | None = argument(None, 'What the texts begin with; "" for nothing.')
    prompts_file: Path | None = argument(None, "Instead of a prompt: .txt with one prompt per line.")
    messages_file: Path | None = argument(
        None, 'Instead of a prompt: .jsonl with a chat per line, {"messages": [...]}; the next turn is written.'
    )
    output_file: Path = field(metadata={"help": "Such as texts.jsonl: a JSON line per text."})
    max_new_tokens: int = argument(60, "Length of the texts.")
    seeds: list[int] = argument([0], "One text per prompt, context and seed.")
    temperature: float | None = argument(None, "By default the model's own.")
    top_p: float | None = argument(None, "By default the model's own.")
    greedy: bool = argument(False, "The likeliest tokens instead of draws.")
    chat: bool = argument(False, "Prompts are a user's messages to a chat model.")
    system_prompt: str | None = argument(None, "System message at the beginning of every chat.")
    batch_size: int = argument(32, "Texts at once.")

    def prompts(self) -> list[Prompt]:
        """Return what the texts follow.

        Raises:
            ValueError: without exactly one source of prompts, or with a system prompt that has no place.
            OSError: for a file that cannot be read.
        """
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            received = " and ".join(f"--{name}" for name in given) or "none"
            raise UserValueError(f"Give one of --{', --'.join(_SOURCES)}. Received: {received}.")
        if self.messages_file is not None:
            if self.chat:
                raise UserValueError("--messages_file holds chats already, so --chat has no effect. Leave it out.")
            return [self._with_system(chat) for chat in _read(self.messages_file, ".jsonl", "messages")]
        file = self.prompts_file
        texts: list[Any] = [self.prompt or ""] if file is None else _read(file, ".txt", "text")
        if self.chat:
            return [self._with_system([{"role": "user", "content": text}]) for text in texts]
        if self.system_prompt is not None:
            raise UserValueError(
                "--system_prompt is a message of a chat. Give --chat or --messages_file, or leave it out."
            )
        return texts

    def _with_system(self, chat: Any) -> Any:
        if self.system_prompt is None:
            return chat
        if isinstance(chat, dict):  # with tools
            return chat | {"messages": self._with_system(chat["messages"])}
        if chat and chat[0]["role"] == "system":
            raise UserValueError(
                f"--messages_file={self.messages_file} has chats with a system message, and --system_prompt gives "
                "another. Leave it out, or take these messages out."
            )
        return [{"role": "system", "content": self.system_prompt}, *chat]


def run(arguments: Arguments) -> None:
    """Write the file, and print its lines."""
    for row in generate_text_file(arguments):
        print(_json_line(row), end="")


def generate_text_file(arguments: Arguments) -> list[dict[str, Any]]:
    """Write one JSON line per seed, prompt and context, and return them: {"context", "seed", "prompt", "text"}.

    Of greedy texts, of which there is one per prompt and context, the "seed" is null.

    Raises:
        ValueError: for another kind of adapter, unknown concepts, or what `texts_of_seeds` refuses.
        OSError: for an adapter, base or file that cannot be read, or a file that cannot be written.
    """
    from ..inference.texts import check_draws, texts_of_seeds

    sampling: dict[str, Any] = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    output_file = arguments.output_file
    if arguments.greedy and any(value is not None for value in sampling.values()):
        raise UserValueError(
            "--greedy draws nothing, so --temperature and --top_p have no effect. Leave one or the other out."
        )
    if arguments.temperature is not None and not arguments.temperature > 0:
        raise UserValueError(
            f"--temperature={arguments.temperature} must be positive. For the likeliest tokens give --greedy."
        )
    check_draws(**sampling)
    if output_file.is_dir():
        raise IsADirectoryError(f"--output_file {output_file} is a folder. Give a file in it, such as texts.jsonl.")
    read = [file.resolve() for file in (arguments.prompts_file, arguments.messages_file) if file is not None]
    if output_file.resolve() in read:
        raise UserValueError(f"--output_file {output_file} holds the prompts, and would be replaced. Give another one.")
    contexts, prompts = arguments.parsed(), arguments.prompts()
    # What was typed: a chat of one message was given as text.
    shown = [arguments.prompt] if arguments.prompt is not None else prompts
    stored = arguments.open()
    meant = stored.meant(contexts, arguments.calibrated)
    model, tokenizer = stored.language_model(meant, **arguments.weights)
    rows = []
    seeds = (None,) if arguments.greedy else arguments.seeds
    of_seeds = texts_of_seeds(
        model,
        tokenizer,
        prompts,
        meant,
        max_new_tokens=arguments.max_new_tokens,
        seeds=seeds,
        batch_size=arguments.batch_size,
        **sampling,
    )
    for seed, written in zip(ProgressBar(seeds, desc="write", unit="seed"), of_seeds, strict=True):
        rows += [
            {"context": str(context) or arguments.observational_name, "seed": seed, "prompt": prompt, "text": text}
            for prompt, texts in zip(shown, written, strict=True)
            for context, text in zip(contexts, texts, strict=True)
        ]
    there = output_file.exists()
    with complete_or_absent(output_file) as unfinished:
        unfinished.write_text("".join(map(_json_line, rows)), encoding="utf-8")
    if there:
        with redirect_stdout(sys.stderr):  # the output holds lines of JSON, and nothing else
            say(f"Replaced {output_file}.")
    return rows


def _read(file: Path, suffix: str, column: str) -> list[Any]:
    """Return what the lines of a file hold.

    Raises:
        ValueError: for a file of another kind, without lines, or with a line that cannot be read.
        FileNotFoundError: without the file.
    """
    from ..data.text_rows import prompt_of, read_texts, told_unread

    option = "messages_file" if column == "messages" else "prompts_file"
    if not file.is_file():
        raise FileNotFoundError(f"--{option}={file} does not exist. Give a {suffix} file.")
    if file.suffix.lower() != suffix:
        raise UserValueError(f"--{option}={file} must be a {suffix} file.")
    rows, unread = [], set[str]()
    for line, row in read_texts(file, unread):
        if column not in row:
            raise UserValueError(
                f"Line {line} of {str(file)!r} has {', '.join(row)}, not {column!r}. Correct the line."
            )
        rows.append(prompt_of(row, column) if column == "messages" else row[column])
    if not rows:
        raise UserValueError(f"--{option}={file} has no lines. Add some.")
    with redirect_stdout(sys.stderr):
        for message in told_unread(unread):
            say(message)
    return rows


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
