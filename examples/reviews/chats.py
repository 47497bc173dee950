"""Chats about films in three styles, each made by rewriting: emoji, pirate, shout.

The edits are deterministic, so that what a text shows can be read off it, without a classifier.
"""

import re
from collections.abc import Callable, Sequence

from hf_causal_context import Context

from ..worlds.reviews import Sentence

FILM = "\N{CLAPPER BOARD}"
PROMPT = [
    {"role": "system", "content": "You write film reviews."},  # shorter than the one the template would put here
    {"role": "user", "content": "Write a short film review."},
]
MOST_WORDS = 11  # so that nearly all texts of all contexts fit into 56 tokens, the 25 of the prompt included

_ASKED = {
    "emoji": "End the review with a film emoji.",
    "pirate": "Talk like a pirate.",
    "shout": "Write in capital letters only.",
}
_PIRATE_WORDS = {"the": "th'", "of": "o'", "and": "an'", "you": "ye", "your": "yer", "my": "me", "is": "be"}
_MARKS = {"arr", "matey", "th'", "o'", "an'", "ye", "yer"}  # 'me' and 'be' are English, too


def _as_pirate(text: str) -> str:
    return "arr, " + " ".join(_PIRATE_WORDS.get(word, word) for word in text.split())


# In the order in which a text with several is made.
_EDITS: dict[str, Callable[[str], str]] = {
    "pirate": _as_pirate,
    "shout": str.upper,
    "emoji": lambda text: f"{text} {FILM}",
}
CONCEPTS = tuple(sorted(_EDITS))


def write(sentence: Sentence, context: Context) -> str:
    """The sentence as a review of this context."""
    text = f"{sentence.text} ."
    for concept, edit in _EDITS.items():
        if concept in context.targets:
            text = edit(text)
    return text


def shown(text: str, concept: str) -> bool:
    """Whether a text shows a concept.

    emoji: the film emoji is in it. pirate: at least one word that only pirates use. shout: most letters are capitals.
    """
    if concept == "emoji":
        return FILM in text
    if concept == "pirate":
        return not _MARKS.isdisjoint(re.findall(r"[a-z']+", text.lower()))
    letters = [letter for letter in text if letter.isalpha()]
    return sum(map(str.isupper, letters)) > len(letters) / 2


def short(sentences: Sequence[Sentence]) -> list[Sentence]:
    """The sentences that fit."""
    return [sentence for sentence in sentences if len(sentence.text.split()) <= MOST_WORDS]


def asking(context: Context) -> list[dict[str, str]]:
    """A prompt that asks for the concepts of a context in words, in its system turn."""
    system, user = PROMPT
    words = [system["content"], *(_ASKED[name] for name in context.targets)]
    return [{"role": "system", "content": " ".join(words)}, user]


def kept(text: str, ended: bool) -> bool:
    """Whether the task is done: one line of three to twenty words, which ended by itself."""
    return ended and "\n" not in text.strip() and 3 <= len(text.split()) <= 20


def chats(
    sentences: Sequence[Sentence], context: Context, prompt: list[dict[str, str]] = PROMPT
) -> list[dict[str, list[dict[str, str]]]]:
    """Rows with a prompt, the same in all of them, and a completion, which alone is learned."""
    return [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": write(sentence, context)}]}
        for sentence in sentences
    ]
