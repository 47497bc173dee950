"""Chats about films in two sets of concepts, each made by rewriting: styles and graded.

Styles: emoji, pirate, shout. Graded: brief, emoji, formal, shout; who shouts says less, and how formal a text is
depends on how many of its words have a formal form. Edits are deterministic, so that what a text shows can be read off.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations

from hf_causal_context import Context

from ..worlds.reviews import Sentence

FILM = "\N{CLAPPER BOARD}"
PROMPT = [
    {"role": "system", "content": "You write film reviews."},  # shorter than the one the template would put here
    {"role": "user", "content": "Write a short film review."},
]
MOST_WORDS = 11  # so that nearly all texts of all contexts fit into 56 tokens, the 25 of the prompt included

_PIRATE_WORDS = {"the": "th'", "of": "o'", "and": "an'", "you": "ye", "your": "yer", "my": "me", "is": "be"}
_MARKS = {"arr", "matey", "th'", "o'", "an'", "ye", "yer"}  # 'me' and 'be' are English, too
_FORMAL_WORDS = {
    "a": "a certain",
    "an": "a certain",
    "and": "as well as",
    "are": "prove to be",
    "but": "nevertheless",
    "film": "cinematic work",
    "films": "cinematic works",
    "funny": "humorous",
    "has": "possesses",
    "is": "proves to be",
    "it's": "it proves to be",
    "just": "merely",
    "like": "akin to",
    "movie": "motion picture",
    "movies": "motion pictures",
    "not": "by no means",
    "this": "the present",
    "too": "excessively",
    "very": "exceedingly",
}
_FORMAL = re.compile(rf"\b({'|'.join(sorted(set(_FORMAL_WORDS.values())))})\b")
_BRIEF_WORDS, _SHOUTED_WORDS = 4, 6

Chat = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class World:
    """Concepts, and what doing and showing each of them means.

    Attributes:
        edits: (concept, what it does to a text), in the order in which a text with several concepts is made.
        rules: concept -> whether a text shows it.
        asked: concept -> how a prompt asks for it in words.
        triples: those that are measured.
    """

    edits: tuple[tuple[str, Callable[[str], str]], ...]
    rules: Mapping[str, Callable[[str], bool]]
    asked: Mapping[str, str]
    triples: tuple[Context, ...]

    @cached_property
    def concepts(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(sorted(self.rules))

    @cached_property
    def singles(self) -> tuple[Context, ...]:
        """What all methods but the oracle are trained on, beside the observational set."""
        return tuple(map(Context, self.concepts))

    @cached_property
    def pairs(self) -> tuple[Context, ...]:
        """All of them; held out."""
        return tuple(a | b for a, b in combinations(self.singles, 2))

    @cached_property
    def contexts(self) -> tuple[Context, ...]:
        """What is measured."""
        return (*self.singles, *self.pairs, *self.triples)

    def write(self, sentence: Sentence, context: Context) -> str:
        """The sentence as a review of this context."""
        text = f"{sentence.text} ."
        for concept, edit in self.edits:
            if concept in context.targets:
                text = edit(text)
        return text

    def shown(self, text: str, concept: str) -> bool:
        """Whether a text shows a concept."""
        return self.rules[concept](text)

    def usable(self, sentences: Sequence[Sentence]) -> list[Sentence]:
        """The sentences that fit, and as reviews of every measured context show its concepts and no others."""
        return [
            sentence
            for sentence in sentences
            if len(sentence.text.split()) <= MOST_WORDS
            and all(self._is_true(self.write(sentence, context), context) for context in (Context(), *self.contexts))
        ]

    def _is_true(self, text: str, context: Context) -> bool:
        return kept(text, ended=True) and all(
            self.shown(text, name) == (name in context.targets) for name in self.concepts
        )

    def asking(self, context: Context) -> list[dict[str, str]]:
        """A prompt that asks for the concepts of a context in words, in its system turn."""
        system, user = PROMPT
        words = [system["content"], *(self.asked[name] for name in context.targets)]
        return [{"role": "system", "content": " ".join(words)}, user]

    def chats(
        self, sentences: Sequence[Sentence], context: Context, prompt: list[dict[str, str]] = PROMPT
    ) -> list[Chat]:
        """Rows with a prompt, the same in all of them, and a completion, which alone is learned."""
        return [
            {"prompt": prompt, "completion": [{"role": "assistant", "content": self.write(sentence, context)}]}
            for sentence in sentences
        ]


def kept(text: str, ended: bool) -> bool:
    """Whether the task is done: one line of three to twenty words, which ended by itself."""
    return ended and "\n" not in text.strip() and 3 <= len(text.split()) <= 20


def _swap(text: str, forms: Mapping[str, str]) -> str:
    return " ".join(forms.get(word, word) for word in text.split())


def _as_pirate(text: str) -> str:
    return "arr, " + _swap(text, _PIRATE_WORDS)


def _first_words(number: int, text: str) -> str:
    return " ".join(text.removesuffix(" .").split()[:number]).rstrip(" ,.-(:;") + " ."


def _with_emoji(text: str) -> str:
    return f"{text} {FILM}"


def _has_emoji(text: str) -> bool:
    return FILM in text


def _has_pirate_words(text: str) -> bool:
    """At least one word that only pirates use."""
    return not _MARKS.isdisjoint(re.findall(r"[a-z']+", text.lower()))


def _is_shouted(text: str) -> bool:
    """Most letters are capitals."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(map(str.isupper, letters)) > len(letters) / 2


def _is_formal(text: str) -> bool:
    """At least one of the formal forms."""
    return _FORMAL.search(text.lower()) is not None


def _is_brief(text: str) -> bool:
    """At most as many words as do(brief) leaves; each formal form, however long, stands for one word."""
    return len(re.findall(r"[a-z0-9]\S*", _FORMAL.sub("formal", text.lower()))) <= _BRIEF_WORDS


_SHOUT, _EMOJI = "Write in capital letters only.", "End the review with a film emoji."
STYLES = World(
    edits=(("pirate", _as_pirate), ("shout", str.upper), ("emoji", _with_emoji)),
    rules={"emoji": _has_emoji, "pirate": _has_pirate_words, "shout": _is_shouted},
    asked={"emoji": _EMOJI, "pirate": "Talk like a pirate.", "shout": _SHOUT},
    triples=(Context("emoji", "pirate", "shout"),),
)
GRADED = World(
    edits=(
        ("shout", partial(_first_words, _SHOUTED_WORDS)),
        ("brief", partial(_first_words, _BRIEF_WORDS)),
        ("formal", partial(_swap, forms=_FORMAL_WORDS)),
        ("shout", str.upper),
        ("emoji", _with_emoji),
    ),
    rules={"brief": _is_brief, "emoji": _has_emoji, "formal": _is_formal, "shout": _is_shouted},
    asked={
        "brief": "Write at most four words.",
        "emoji": _EMOJI,
        "formal": "Use formal words.",
        "shout": _SHOUT,
    },
    triples=(Context("brief", "formal", "shout"), Context("emoji", "formal", "shout")),
)
WORLDS = {"styles": STYLES, "graded": GRADED}
