"""Combinations that nobody wrote: the adapter's own texts that show all their concepts join its training.

Where no row looks intervened on by itself, as with texts that a rule rewrites, there is nothing to reweight. What an
adapter of single concepts writes in a combination may then show all of them seldom: the first words decide, and each
concept knows others. The few texts that show them all are the only rows there are; learned, they become more. So the
rows are made anew in rounds, each time by what the last round taught.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel

from ..._random import seeded
from ...adapter.intervene import intervene
from ...bases.token_batches import TextBatch
from ...bases.tokens import IGNORED, Ids, Tokenization, TokenRow
from ...contexts import Context
from ...data import InterventionalData
from ...data.reweighting import check_sets, wanted_combinations
from ...data.text_rows import prompt_of
from ...errors import UserValueError
from ...evaluation.concept_finder import ConceptFinder
from ...inference.sampling import eval_mode
from ...messages.progress import ProgressBar, say
from ...messages.wording import quoted
from ..arguments import TextArguments
from ..few_rows import few_rows
from ..loop.checkpoints import earlier_run, write_file, write_text
from ..loop.hooks import StepHooks
from ..loop.processes import main_process_first
from .batches import TextBatches
from .own_texts import continuations, row_of

FOLDER = "self_composed"
# When rounds begin, as shares of the steps that train concepts.
ROUNDS = (0.4, 0.6, 0.8)
STRENGTHS = (1.0, 1.25, 1.5)  # of what is written, in turn: beyond 1, concepts show more often
WANTED, MOST_WRITTEN, FEWEST = 64, 768, 8  # texts of a combination in a round
_AT_ONCE = 64
_MOST_PROMPTS = 512
_LEFT = "It is left to the mechanism."

Rows = dict[str, list[TokenRow]]


def self_composed_contexts(data: InterventionalData, arguments: TextArguments) -> list[Context]:
    """Return the combinations of `--self_composed_contexts`.

    Raises:
        ValueError: for unknown concepts, or sets that cannot tell what a text shows.
    """
    if not arguments.self_composed_contexts:
        return []
    wanted = wanted_combinations(arguments.self_composed_contexts, data.concepts)
    check_sets(cast(Dataset, data.rows)["context"][:], data.concepts, "--self_composed_contexts")
    return wanted


class SelfComposition(StepHooks):
    """The rows of each round, which are written before its first step.

    Args:
        accelerator: of the run.
        model: the adapter in training.
        contexts: combinations to be written.
        data: with the observational set and one set per concept.
        tokens: those of all its rows.
        tokenize: row -> tokens.
        arguments: of the run, with settled observational steps.
        begun_steps: of the run, when it began.

    Attributes:
        begins: the steps at which rounds begin.

    Raises:
        ValueError: for observational rows without a prompt that the model could write after.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PeftModel,
        contexts: Sequence[Context],
        data: InterventionalData,
        tokens: Sequence[TokenRow],
        tokenize: Tokenization,
        arguments: TextArguments,
        begun_steps: int,
    ) -> None:
        self._accelerator, self._model, self._contexts, self._data = accelerator, model, contexts, data
        self._tokens, self._tokenize, self._arguments = tokens, tokenize, arguments
        before = arguments.observational_steps or 0
        self.begins = sorted({before + int(share * (begun_steps - before)) for share in ROUNDS} - {begun_steps})
        if not self._prompts:
            raise UserValueError(
                "--self_composed_contexts lets the model write after observational prompts, and all of them fill its "
                f"rows of {tokenize.max_length} tokens. Raise --max_length where the model allows it, shorten the "
                "prompts, or leave the option out."
            )

    def take_over(self) -> None:
        """Copy the rounds of the run that this one goes on with, if that has a folder of its own.

        Raises:
            CheckpointError: where they cannot be written.
        """
        earlier, output_dir = earlier_run(self._arguments), Path(self._arguments.output_dir)
        if earlier is None or earlier.resolve() == output_dir.resolve() or not self._accelerator.is_main_process:
            return
        for path in (earlier / FOLDER).glob("round-*.jsonl"):
            copy = output_dir / FOLDER / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_file(copy, output_dir, partial(shutil.copyfile, path))

    def start_step(self, step: int) -> None:
        """Where a round begins, write its rows, by the model as it is now.

        Raises:
            CheckpointError: where they cannot be written.
        """
        if step not in self.begins:
            return
        number, output_dir = self.begins.index(step), Path(self._arguments.output_dir)
        with main_process_first(self._accelerator, output_dir):  # the others read
            if self._accelerator.is_main_process:
                lines = [line for context in self._contexts for line in self._write(number, context)]
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                path = self._path(number)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, output_dir, text)

    def rows(self, number: int) -> Rows:
        """Return the rows of a round that has begun, perhaps before the run was interrupted.

        Raises:
            FileNotFoundError: where they are gone.
        """
        rows: Rows = {}
        for entry in _entries(self._path(number)):
            rows.setdefault(entry["context"], []).append(self._row(entry["prompt_tokens"], entry["tokens"]))
        return rows

    @property
    def counts(self) -> dict[str, int]:
        """How many rows each combination has in the last round; 0 before that."""
        # Of a run that was made shorter, the last rounds did not begin.
        there = [path for number in range(len(self.begins)) if (path := self._path(number)).is_file()]
        written = Counter(entry["context"] for path in there[-1:] for entry in _entries(path))
        return {str(context): written[str(context)] for context in self._contexts}

    def _write(self, number: int, context: Context) -> list[dict[str, Any]]:
        """Let the model write until enough texts show all concepts of a context, and say how many do."""
        if unclear := self._finder.unclear(context):
            said = f"{context}: classifiers of texts do not tell {quoted(unclear)} from the observational set. {_LEFT}"
            say(said, said)
            return []
        generator = np.random.default_rng((self._arguments.seed, number, self._contexts.index(context)))
        kept: dict[str, dict[str, Any]] = {}
        written = 0
        with ProgressBar(desc=f"write {context}", unit="text", total=MOST_WRITTEN) as bar:
            for strength in cycle(STRENGTHS):
                prompts, own = self._draw(context, strength, generator)
                # Read as what they are learned as, which is what the classifiers know: with prompts that are learned.
                read = [self._row(prompt, ids).labels for prompt, ids in zip(prompts, own, strict=True)]
                found = self._finder.find(context, [self._text(labels) for labels in read])
                for prompt, ids, shows in zip(prompts, own, found, strict=True):
                    if shows and (text := self._text(ids)) not in kept:
                        line = {"context": str(context), "text": text}
                        kept[text] = line | {"prompt_tokens": list(prompt), "tokens": ids.tolist()}
                written += len(own)
                bar.update(len(own))
                if len(kept) >= WANTED or written >= MOST_WRITTEN:
                    break
        said = f"{context}: {len(kept)} of {written} own texts show all concepts"
        if len(kept) < FEWEST:
            say(f"{said}. {_LEFT}", f"{said}. {_LEFT}")
            return []
        say(f"{said}, and are trained on.")
        return list(kept.values())

    def _draw(
        self, context: Context, strength: float, generator: np.random.Generator
    ) -> tuple[list[list[int]], list[Ids]]:
        """Return the prompts of observational rows, all of one length, and what the model writes after them."""
        length = len(self._prompts[generator.integers(len(self._prompts))])
        alike = [prompt for prompt in self._prompts if len(prompt) == length]  # some models would read what fills up
        prompts = [alike[n] for n in generator.integers(len(alike), size=_AT_ONCE)]
        room = self._room_after(prompts[0])
        with (
            torch.no_grad(),
            eval_mode(self._model),
            seeded(int(generator.integers(2**31)), self._model.device),
            self._accelerator.autocast(),
            intervene(self._model, Context(dict.fromkeys(context.targets, strength))),
        ):
            end = cast("int | None", self._tokenize.tokenizer.eos_token_id)
            return prompts, continuations(self._model, prompts, [room] * len(prompts), end)

    def _path(self, number: int) -> Path:
        return Path(self._arguments.output_dir, FOLDER, f"round-{number + 1}.jsonl")

    def _row(self, prompt: Sequence[int], written: Sequence[int] | Ids) -> TokenRow:
        whole = not (self._tokenize.completion_only or self._tokenize.assistant_only)
        return row_of(prompt, written, encoder_decoder=self._tokenize.encoder_decoder, learn_prompt=whole)

    def _text(self, ids: Ids) -> str:
        return cast(str, self._tokenize.tokenizer.decode(ids[ids != IGNORED], skip_special_tokens=True))

    @cached_property
    def _prompts(self) -> list[list[int]]:
        """What observational texts follow, where a row has room for more."""
        rows = cast(Iterable[dict[str, Any]], few_rows(self._data, "", _MOST_PROMPTS, self._arguments.seed))
        prompts = [self._tokenize.beginning(prompt_of(row, self._tokenize.content_column)) for row in rows]
        return [prompt for prompt in prompts if self._room_after(prompt) > 0]

    def _room_after(self, prompt: Sequence[int]) -> int:
        """Return how many tokens may follow: as many as nearly all rows learn, in rows as long as those of the data."""
        return min(self._learned, self._tokenize.max_length - (0 if self._tokenize.encoder_decoder else len(prompt)))

    @cached_property
    def _learned(self) -> int:
        return int(np.quantile([np.count_nonzero(row.labels != IGNORED) for row in self._tokens], 0.95))

    @cached_property
    def _finder(self) -> ConceptFinder:
        known = {str(context): context for context in (Context(), *map(Context, self._data.concepts))}
        texts: dict[Context, list[str]] = {context: [] for context in known.values()}
        for name, row in zip(cast(Dataset, self._data.rows)["context"][:], self._tokens, strict=True):
            if name in known:
                texts[known[name]].append(self._text(row.labels))
        return ConceptFinder(texts, self._arguments.seed)


def _entries(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # texts may hold characters that end lines elsewhere
        return [json.loads(line) for line in file]


class ComposedBatches:
    """Batches of the rows that there are, and from the first round on of own texts, too; called like `TextBatches`."""

    def __init__(self, batches: TextBatches, begins: Sequence[int], rows: Callable[[int], Rows]) -> None:
        self._batches, self._begins, self._rows = batches, begins, rows

    def __call__(self, start: int, num_observational: int = 0) -> Iterator[TextBatch]:
        """Batches from number `start` on; the rows of a round are read when its first batch is asked for."""
        begun = sum(begin <= start for begin in self._begins)
        for number, end in enumerate([*self._begins[begun:], None], begun):
            batches = self._batches.joined_by(self._rows(number - 1)) if number else self._batches
            yield from islice(batches(start, num_observational), None if end is None else end - start)
            start = end or start
