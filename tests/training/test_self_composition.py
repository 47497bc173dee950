"""Combinations whose rows the model in training writes itself: what is found, when, and runs that go on."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_causal_context.bases.token_batches import Collation
from hf_causal_context.bases.tokens import Tokenization
from hf_causal_context.contexts import Context
from hf_causal_context.errors import UserValueError
from hf_causal_context.evaluation.concept_finder import ConceptFinder
from hf_causal_context.training.language import self_composition, train_text
from hf_causal_context.training.language.batches import TextBatches
from hf_causal_context.training.language.self_composition import FOLDER, ComposedBatches
from hf_causal_context.training.loop.trainer import Run, TrainingInterrupted, UnreadableDataError

from . import small_language
from .small import adapter_weights
from .small_language import CPU, language_model, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")

CONCEPTS = ("formal", "loud")
PAIR = Context(*CONCEPTS)
NEUTRAL = ["cat", "dog", "sat", "ran"]
ENGLISH = ["a", "film", "of", "the", "year", "and", "you", "know", "it", "is", "so", "very", "good"]


SHORT = {"max_train_steps": 12, "observational_steps": 2}  # rounds begin at 6, 8, 10


def write(rng, context):
    """A text of two words; deterministic edits put a mark before it, or behind it."""
    words = rng.choices(NEUTRAL, k=2)
    return " ".join(["indeed"] * ("formal" in context) + words + ["loudly"] * ("loud" in context))


def world(shape="text", rows=40):
    rng = random.Random(0)
    columns = {"context": [context for context in ("", *CONCEPTS) for _ in range(rows)]}
    texts = [write(rng, context) for context in columns["context"]]
    if shape == "prompt":
        columns |= {"prompt": ["a", "the mat"] * (len(texts) // 2), "completion": texts}
    else:
        columns["text"] = texts
    return small_language.singles_data(columns, shape)


def arguments(tmp_path, **changes):
    given = {"train_batch_size": 12, "max_train_steps": 40, "observational_steps": 4, "learning_rate": 3e-2}
    return small_language.arguments(tmp_path, **given | {"self_composed_contexts": ["pairs"]} | changes)


def run(tmp_path, data, name="llama", **changes):
    return train_text(arguments(tmp_path, **changes), language_model(name), word_tokenizer(bos=True), data)


def rounds(tmp_path, folder="out"):
    files = sorted((tmp_path / folder / FOLDER).iterdir())
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@pytest.fixture
def quick(monkeypatch):
    """Fewer texts than a user wants."""
    for name, value in {"WANTED": 8, "MOST_WRITTEN": 64, "FEWEST": 1, "_AT_ONCE": 32}.items():
        monkeypatch.setattr(self_composition, name, value)


class TestFinder:
    @staticmethod
    def finder(edits, seed=0):
        rng = random.Random(1)
        texts = [" ".join(rng.choices(ENGLISH, k=8)) for _ in range(300)]
        sets = {Context(): texts} | {Context(name): list(map(edit, texts)) for name, edit in edits.items()}
        return ConceptFinder(sets, seed), texts

    def test_a_text_of_a_combination_is_found_though_each_edit_hides_marks_of_the_other(self):
        edits = {"loud": str.upper, "pirate": lambda text: "arr, " + text.replace("the ", "th' ")}
        finder, texts = self.finder(edits)
        both = [str.upper(edits["pirate"](text)) for text in texts]
        assert finder.find(Context("loud", "pirate"), both).mean() > 0.95
        for one in (texts, [edits["loud"](text) for text in texts], [edits["pirate"](text) for text in texts]):
            assert finder.find(Context("loud", "pirate"), one).mean() < 0.05
        assert finder.unclear(Context("loud", "pirate")) == []

    def test_a_concept_that_shows_nowhere_is_unclear(self):
        finder, _ = self.finder({"loud": str.upper, "nothing": lambda text: text})
        assert finder.unclear(Context("loud", "nothing")) == ["nothing"]


class TestBatches:
    @staticmethod
    def batches(tmp_path, **changes):
        given = arguments(tmp_path, **changes)
        tokenize = Tokenization(word_tokenizer(), "text", max_length=24)
        row = tokenize({"text": "indeed cat sat loudly"})
        asked = []

        def rows(number):
            asked.append(number)
            return {"formal+loud": [row] * 5} if number else {}

        return ComposedBatches(TextBatches(world(), tokenize, Collation(0, CPU), given), [3, 5], rows), asked

    def test_rows_are_asked_for_when_their_round_begins(self, tmp_path):
        batches, asked = self.batches(tmp_path)
        stream, seen = batches(0), []
        for number in range(8):
            shares = (next(stream).context.sum(1) == 2).float().mean()
            seen.append(float(shares))
            assert asked == [0, 1][: (number >= 3) + (number >= 5)]
        assert seen[:5] == [0] * 5
        assert sum(seen[5:]) / 3 == pytest.approx(2 / 5, abs=0.05)  # twice as much as each of the others

    @pytest.mark.parametrize(
        ("start", "expected"),
        [(2, [0, 1]), (3, [0, 1]), (4, [0, 1]), (5, [1]), (6, [1])],
    )
    def test_a_resumed_run_has_the_same_batches(self, start, expected, tmp_path):
        batches, asked = self.batches(tmp_path)
        whole = list(itertools.islice(batches(0), 8))[start:]
        asked.clear()
        resumed = list(itertools.islice(batches(start), 8 - start))
        assert asked == expected
        for ours, theirs in zip(resumed, whole, strict=True):
            assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])
            assert torch.equal(ours.context, theirs.context)


def test_own_texts_that_show_all_concepts_are_trained_on(tmp_path, quick, capsys):
    everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    learned = {"max_train_steps": 300, "learning_rate": 1e-2, "concept_rank": 8, "target_modules": everywhere}
    folder = run(tmp_path, world(), **learned)
    said = capsys.readouterr().out
    written = rounds(tmp_path)
    assert list(written) == ["round-1.jsonl", "round-2.jsonl", "round-3.jsonl"]
    last = written["round-3.jsonl"]
    assert last
    for line in last:
        words = line["text"].split()
        assert {"indeed", "loudly"} <= set(words)
        assert word_tokenizer().decode(line["tokens"], skip_special_tokens=True) == line["text"]
    assert f"formal+loud: {len(last)} of" in said
    record = json.loads((folder / "training_data.json").read_text())
    assert record["self_composed"] == {"formal+loud": len(last)}
    assert f"{len(last)} texts that the adapter wrote itself, trained on" in (folder / "README.md").read_text()
    losses = json.loads((folder / "training_losses.json").read_text())
    assert "formal+loud" in str(losses)


def test_combinations_that_hardly_show_are_left_to_the_mechanism(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(self_composition, "FEWEST", 65)
    folder = run(tmp_path, world(), **SHORT)
    assert rounds(tmp_path) == {f"round-{number}.jsonl": [] for number in (1, 2, 3)}
    assert "of 64 own texts show all concepts. It is left to the mechanism." in capsys.readouterr().out
    assert json.loads((folder / "training_data.json").read_text())["self_composed"] == {"formal+loud": 0}


@pytest.fixture
def all_found(quick, monkeypatch):
    """Texts of a model that has learned next to nothing, as if they showed all concepts."""
    monkeypatch.setattr(ConceptFinder, "find", lambda self, combination, texts: np.ones(len(texts), dtype=bool))


@pytest.mark.parametrize(
    ("name", "shape", "changes"),
    [
        ("llama", "text", {}),
        ("llama", "prompt", {"gradient_accumulation_steps": 2, "train_batch_size": 6}),
        ("llama", "text", {"packing": True, "max_length": 24}),
        ("t5", "prompt", {}),
    ],
)
def test_a_resumed_run_gives_the_same_adapter(name, shape, changes, tmp_path, all_found, monkeypatch):
    changes = SHORT | changes
    run(tmp_path, world(shape), name, **changes)
    whole, written = adapter_weights(tmp_path / "out"), rounds(tmp_path)
    assert all(len(lines) >= 8 for lines in written.values())
    for stop in (7, 8):  # amid a round, and where one begins
        half = changes | {"output_dir": str(tmp_path / f"half-{stop}")}
        with pytest.raises(TrainingInterrupted), interrupted_after(monkeypatch, stop):
            run(tmp_path, world(shape), name, **half)
        run(tmp_path, world(shape), name, **half, resume_from_checkpoint="latest")
        resumed = adapter_weights(tmp_path / f"half-{stop}")
        assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
        assert rounds(tmp_path, f"half-{stop}") == written


def test_a_run_that_is_made_longer_keeps_its_rounds(tmp_path, all_found):
    run(tmp_path, world(), **SHORT)
    written = rounds(tmp_path)
    again = SHORT | {"resume_from_checkpoint": "latest"}
    folder = run(tmp_path, world(), **again | {"max_train_steps": 40})  # whose own would begin at 17, 24 and 32
    assert rounds(tmp_path) == written
    record = json.loads((folder / "training_data.json").read_text())
    assert record["self_composed"] == {"formal+loud": len(written["round-3.jsonl"])}


@contextmanager
def interrupted_after(monkeypatch, step):
    """Ctrl-C comes during a step."""
    take = Run.train_step

    def interrupt(self):
        take(self)
        if self.done == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", interrupt)
        yield


def test_prompts_are_those_of_observational_rows(tmp_path, all_found, monkeypatch):
    monkeypatch.setattr(self_composition, "WANTED", 64)
    run(tmp_path, world("prompt"), **SHORT)
    tokenizer = word_tokenizer()
    lines = [line for lines in rounds(tmp_path).values() for line in lines]
    assert {tokenizer.decode(line["prompt_tokens"], skip_special_tokens=True) for line in lines} == {"a", "the mat"}


def test_a_run_that_goes_on_in_another_folder_has_all_rounds_there(tmp_path, all_found, monkeypatch):
    run(tmp_path, world(), **SHORT)
    changes = SHORT | {"output_dir": str(tmp_path / "half"), "checkpointing_steps": 7}
    with pytest.raises(TrainingInterrupted), interrupted_after(monkeypatch, 8):
        run(tmp_path, world(), **changes)
    changes |= {"output_dir": str(tmp_path / "new")}
    half = str(tmp_path / "half" / "checkpoint-7")
    with pytest.raises(TrainingInterrupted), interrupted_after(monkeypatch, 7 + 2):
        run(tmp_path, world(), **changes, resume_from_checkpoint=half)
    shutil.rmtree(tmp_path / "half")  # which the new one no longer needs
    run(tmp_path, world(), **changes, resume_from_checkpoint="latest")
    assert rounds(tmp_path, "new") == rounds(tmp_path)
    whole, resumed = adapter_weights(tmp_path / "out"), adapter_weights(tmp_path / "new")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())


def chats(long):
    """Conversations whose observational ones, in the given share, begin longer than a row of the model."""
    rng = random.Random(0)
    columns = {"context": [context for context in ("", *CONCEPTS) for _ in range(40)], "messages": []}
    for number, context in enumerate(columns["context"]):
        words = 40 if context == "" and number < 40 * long else 1
        asked = " ".join(rng.choices(NEUTRAL, k=words))
        turns = [asked, write(rng, ""), asked, write(rng, context)]
        roles = ("user", "assistant", "user", "assistant")
        columns["messages"].append([{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)])
    return small_language.singles_data(columns, "messages")


def test_own_texts_are_read_as_they_are_learned(tmp_path, all_found, monkeypatch):
    find, read = ConceptFinder.find, []
    monkeypatch.setattr(ConceptFinder, "find", lambda self, c, texts: read.append(texts) or find(self, c, texts))
    for shape, learned, shown in (("prompt", {}, False), ("prompt", {"completion_only_loss": False}, True)):
        folder = str(tmp_path / str(shown))
        run(tmp_path, world(shape), **SHORT, **learned, output_dir=folder)
        starts = [f"{text} ".startswith(("a ", "the mat ")) for texts in read for text in texts]
        assert all(starts) == shown
        lines = [line for lines in rounds(tmp_path, str(shown)).values() for line in lines]
        assert not all(f"{line['text']} ".startswith(("a ", "the mat ")) for line in lines)
        read.clear()


def test_prompts_that_fill_a_row_are_left_out(tmp_path, all_found):
    run(tmp_path, chats(0.9), **SHORT)
    lines = [line for lines in rounds(tmp_path).values() for line in lines]
    assert lines
    assert all(len(line["prompt_tokens"]) < 20 and line["tokens"] for line in lines)


def test_rows_of_own_texts_are_no_longer_than_those_of_the_data(tmp_path, all_found, monkeypatch):
    monkeypatch.setattr(ConceptFinder, "unclear", lambda self, combination: [])
    run(tmp_path, chats(0), **SHORT, max_length=16)
    lines = [line for lines in rounds(tmp_path).values() for line in lines]
    assert max(len(line["prompt_tokens"]) + len(line["tokens"]) for line in lines) == 16


def test_a_run_whose_prompts_all_fill_a_row_does_not_begin(tmp_path):
    with pytest.raises(UserValueError, match="all of them fill its rows of 64 tokens. Raise --max_length where"):
        run(tmp_path, chats(1), **SHORT)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_combinations_that_all_have_rows_are_told(tmp_path, capsys):
    data = world()
    rows = data.rows.to_dict()
    rows["context"][-20:] = ["formal+loud"] * 20
    rows["text"][-20:] = ["indeed cat loudly"] * 20
    contexts = (*data.contexts, str(PAIR))
    run(tmp_path, dataclasses.replace(data, rows=Dataset.from_dict(rows), contexts=contexts), **SHORT)
    assert "No combination is left to be written: all that were named have training rows." in capsys.readouterr().out


def test_a_round_that_is_gone_is_named(tmp_path, all_found, monkeypatch):
    with pytest.raises(TrainingInterrupted), interrupted_after(monkeypatch, 7):
        run(tmp_path, world(), **SHORT)
    (tmp_path / "out" / FOLDER / "round-1.jsonl").unlink()
    with pytest.raises(UnreadableDataError, match=r"The data of step 8 cannot be read: .*round-1.jsonl.* Put back"):
        run(tmp_path, world(), **SHORT, resume_from_checkpoint="latest")


def test_a_dry_run_writes_no_texts(tmp_path):
    run(tmp_path, world(), **SHORT, dry_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["streaming", "shard_base"])
def test_what_cannot_write_is_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"which --{option} does not allow. Leave one of them out"):
        arguments(tmp_path, **{option: True})


def test_wrong_names_and_missing_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown concept 'round'"):
        run(tmp_path, world(), self_composed_contexts=["round+loud"])
    with pytest.raises(ValueError, match="--self_composed_contexts needs .* the set of 'loud' has 1"):
        run(tmp_path, world(rows=1))
