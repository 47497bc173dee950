"""The real texts of every context: as tokens, for perplexities, and as what a model would write, for classifiers.

Shapes: B rows, K concepts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from peft import PeftModel

from ..bases.likelihoods import perplexity
from ..bases.token_batches import Collation, TextBatch, tokenized
from ..bases.tokens import Prompt, Tokenization, TokenRow
from ..contexts import ConceptSet, Context
from ..data import InterventionalData
from ..data.text_rows import prompt_of
from ..messages.progress import ProgressBar
from .real_rows import rows_of_contexts
from .results import Perplexity
from .sampling import adapters_disabled

MAX_REAL_TEXTS = 1000  # per context; more add time to the classifiers, and little else
MAX_SCORED_TEXTS = 200  # per context, for perplexities
_LONGEST = 128  # tokens of a text that classifiers read, unless it is given
_COVERED = 0.9  # share of the real texts that are read whole


@dataclass
class RealTexts:
    """Real texts of one context: what a model would write, and the tokens of the first rows with their prompts."""

    texts: list[str] = field(default_factory=list)
    rows: list[TokenRow] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)


def read_real_texts(data: InterventionalData, tokenize: Tokenization, seed: int = 0) -> dict[Context, RealTexts]:
    """At most `MAX_REAL_TEXTS` of each context, trained and held out; of a stream the first ones.

    Raises:
        ValueError: for a row that cannot be tokenized.
    """
    real: defaultdict[Context, RealTexts] = defaultdict(RealTexts)
    for name, row in rows_of_contexts(data, MAX_REAL_TEXTS, seed, unit="text"):
        own = real[Context.parse(name)]
        own.texts.append(_written(row, data.content_column))
        own.prompts.append(prompt_of(row, data.content_column))
        if len(own.rows) < MAX_SCORED_TEXTS:
            own.rows += tokenized([row], tokenize)
    return dict(real)


def usual_length(real: Mapping[Context, RealTexts], tokenize: Tokenization) -> int:
    """Tokens of a long real text: as many as nine of ten have at most."""
    lengths = [len(_ids(text, tokenize)) for own in real.values() for text in own.texts]
    return max(1, min(_LONGEST, int(np.quantile(lengths, _COVERED))))


def shortened(texts: Sequence[str], tokenize: Tokenization, length: int) -> list[str]:
    """Texts as a model writes them: cut to `length` tokens, and through the tokenizer, which may lose something."""
    return tokenize.tokenizer.batch_decode([_ids(text, tokenize)[:length] for text in texts], skip_special_tokens=True)


def perplexities(
    model: PeftModel,
    real: Mapping[Context, RealTexts],
    collate: Collation,
    concepts: ConceptSet,
    batch_size: int,
) -> dict[Context, Perplexity]:
    """Of the real rows of every context: in it, in the empty context, and under the base without its adapter."""
    scored = {}
    with ProgressBar(
        total=3 * sum(len(own.rows) for own in real.values()), desc="score real texts", unit="text"
    ) as bar:

        def measured(own: RealTexts, context: Context) -> float:
            value = perplexity(model, _batches(own.rows, context, collate, concepts, batch_size))
            bar.update(len(own.rows))
            return value

        for context, own in real.items():
            adapter, empty = (measured(own, each) for each in (context, Context()))
            with adapters_disabled(model):
                base = measured(own, Context())
            scored[context] = Perplexity(adapter, empty, base, len(own.rows))
    return scored


def _written(row: Mapping[str, Any], column: str) -> str:
    """Return what a model is to write of a row: the completion, or the last message."""
    content = row["completion"] if column == "prompt" else row[column]
    return content if isinstance(content, str) else content[-1].get("content") or ""


def _ids(text: str, tokenize: Tokenization) -> list[int]:
    ids: Any = tokenize.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _batches(
    rows: Sequence[TokenRow], context: Context, collate: Collation, concepts: ConceptSet, size: int
) -> Iterator[TextBatch]:
    mask_1K = concepts.mask([context])
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        yield collate(some, mask_1K.expand(len(some), -1))
