"""Film reviews in a small causal world: shouted reviews are often brief; questions and the critic are free.

    shouting -> brief        question        ebert (the critic's name)

The sentences are real (Pang and Lee, "Seeing stars", ACL 2005: 10,662 snippets of reviews). A concept is intervened on
by rewriting: do(question) turns any sentence into a question, whoever wrote it and however loud. So the other concepts
keep their natural rates, but for what the concept causes. Selecting the positive sentences is no intervention: nobody
made them positive, and they differ in whatever else makes a critic happy; see `select_positive`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_causal_context.contexts import ConceptSet, ContextLike, as_context

CONCEPTS = ("shouting", "question", "brief", "ebert")
HUB_DATASET = "cornell-movie-review-data/rotten_tomatoes"

_CRITICS = ("variety", "newsday", "salon", "slate", "ebert")
_QUESTIONS = ("is it true that {} ?", "do you think that {} ?", "who says that {} ?")
_SHOUTED, _ASKED = 0.15, 0.15
_BRIEF_IF_SHOUTED, _BRIEF_OTHERWISE = 0.4, 0.15
_BRIEF_WORDS = 5
_FEWEST_WORDS, _MOST_WORDS = 8, 24


@dataclass(frozen=True)
class Sentence:
    """A sentence of a review in lower case, without its closing mark, and whether the review was positive."""

    text: str
    positive: bool


def read_sentences(folder: str | Path | None = None) -> list[Sentence]:
    """The corpus's declarative sentences of 8 to 24 words, in a fixed random order; neighbors are unrelated.

    Args:
        folder: holds ``rt-polarity.pos`` and ``rt-polarity.neg``, as the authors publish them; by default the same
            corpus is taken from the Hub.

    Raises:
        FileNotFoundError: for a folder without these files.
    """
    if folder is None:
        from datasets import concatenate_datasets, load_dataset

        splits = load_dataset(HUB_DATASET)
        rows = concatenate_datasets([splits[name] for name in sorted(splits)])
        snippets = [(row["text"], bool(row["label"])) for row in rows]  # type: ignore[index]
    else:
        files = [(Path(folder, "rt-polarity.pos"), True), (Path(folder, "rt-polarity.neg"), False)]
        if missing := [str(path) for path, _ in files if not path.is_file()]:
            raise FileNotFoundError(
                f"There is no {missing[0]}. Give the folder with rt-polarity.pos and rt-polarity.neg (sentence "
                f"polarity dataset v1.0), or none, to read {HUB_DATASET} from the Hub."
            )
        snippets = [
            (line, positive) for path, positive in files for line in path.read_text(encoding="latin-1").splitlines()
        ]
    cleaned = [(re.sub(r"[^ -~]", "", text).strip().lower().rstrip(" .!"), positive) for text, positive in snippets]
    sentences = {
        text: Sentence(text, positive)
        for text, positive in cleaned
        if "?" not in text and _FEWEST_WORDS <= len(text.split()) <= _MOST_WORDS
    }
    ordered = [sentences[text] for text in sorted(sentences)]
    return [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))]


def write_reviews(
    sentences: Sequence[Sentence], num: int, context: ContextLike = (), seed: int = 0
) -> tuple[list[str], NDArray[np.bool_]]:
    """Draw reviews from the world under a context.

    Args:
        sentences: what they say; all are used once before any is used again.
        num: number of reviews.
        context: the concepts intervened on; () is observational. Strengths do not matter.
        seed: of the order of the sentences and of the concepts that are not intervened on.

    Returns:
        Texts, and whether they show each concept, (num, 4).

    Raises:
        ValueError: for a concept this world does not have.
    """
    targets = ConceptSet(CONCEPTS).mask([as_context(context)])[0] != 0
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(len(sentences)) for _ in range(-(-num // len(sentences)))])[:num]
    shouting = (rng.random(num) < _SHOUTED) | bool(targets[0])
    question = (rng.random(num) < _ASKED) | bool(targets[1])
    brief = (rng.random(num) < np.where(shouting, _BRIEF_IF_SHOUTED, _BRIEF_OTHERWISE)) | bool(targets[2])
    critics = np.where(targets[3], len(_CRITICS) - 1, rng.integers(len(_CRITICS), size=num))
    forms = rng.integers(len(_QUESTIONS), size=num)
    texts = []
    for i, number in enumerate(chosen):
        words = sentences[number].text.split()
        body = " ".join(words[:_BRIEF_WORDS]).rstrip(" ,.-(:;") if brief[i] else " ".join(words)
        body = _QUESTIONS[forms[i]].format(body) if question[i] else f"{body} ."
        text = f"{body} -- {_CRITICS[critics[i]]}"
        texts.append(text.upper() if shouting[i] else text)
    return texts, np.stack([shouting, question, brief, critics == len(_CRITICS) - 1], axis=1)


def select_positive(sentences: Sequence[Sentence]) -> list[Sentence]:
    """The sentences of positive reviews: a selection, to be compared with interventions."""
    return [sentence for sentence in sentences if sentence.positive]
