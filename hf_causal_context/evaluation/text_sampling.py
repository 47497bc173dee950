"""Texts of a language model's adapter and of its base, from the same prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..bases.tokens import Prompt
from ..contexts import ConceptSet, Context
from ..inference.texts import generate_texts
from ..messages.progress import ProgressBar
from .sampling import MAX_CURVE_SAMPLES, adapters_disabled, curve_strengths


@dataclass
class SampledTexts:
    """Texts per context and of the base, by seed groups, and those of the strength curves."""

    samples: dict[Context, list[list[str]]]
    base: list[list[str]]
    strengths: dict[str, dict[float, list[str]]]


@dataclass
class TextSampler:
    """Writes texts in batches.

    Attributes:
        model: with its adapter.
        tokenizer: the model's.
        prompts: sample n follows prompt n, counted from the first again where there are fewer.
        max_new_tokens: length of the texts.
        batch_size: texts at once.
        with_prompt: whether the prompt is a part of the text, as the beginning of a plain text is.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    max_new_tokens: int
    batch_size: int
    with_prompt: bool = False

    def __call__(self, jobs: Sequence[tuple[Context, int]], bar: ProgressBar) -> dict[tuple[Context, int], str]:
        """The text of each context and number of a sample. Jobs of one prompt share batches, so nothing is padded."""
        by_prompt: defaultdict[int, list[tuple[Context, int]]] = defaultdict(list)
        for context, number in jobs:
            by_prompt[number % len(self.prompts)].append((context, number))
        texts = {}
        seed = 0
        for place, own in by_prompt.items():
            for start in range(0, len(own), self.batch_size):
                batch = own[start : start + self.batch_size]
                [written] = generate_texts(
                    self.model,
                    self.tokenizer,
                    [self.prompts[place]],
                    [context for context, _ in batch],
                    max_new_tokens=self.max_new_tokens,
                    seed=seed,
                    with_prompt=self.with_prompt,
                )
                seed += 1
                bar.update(len(batch))
                texts |= dict(zip(batch, written, strict=True))
        return texts


def sample_all_texts(
    sample: TextSampler, concepts: ConceptSet, contexts: Sequence[Context], num_samples: int, num_seeds: int
) -> SampledTexts:
    """Sample contexts, the empty one and the single concepts among them, with a progress bar.

    Sample n follows the same prompt in every context; the strength curves take the first ones of the first group.
    """
    groups = [range(group * num_samples, (group + 1) * num_samples) for group in range(num_seeds)]
    every = [number for group in groups for number in group]
    few = groups[0][:MAX_CURVE_SAMPLES]
    curves = {name: {s: Context({name: s}) for s in curve_strengths(name, contexts)} for name in concepts}
    between = [c for curve in curves.values() for c in curve.values() if c not in contexts]
    jobs = [(context, number) for context in contexts for number in every]
    jobs += [(context, number) for context in between for number in few]
    with ProgressBar(total=len(jobs) + len(every), desc="sample", unit="text") as bar:
        written = sample(sorted(jobs, key=lambda job: job[1]), bar)
        with adapters_disabled(sample.model):
            of_base = sample([(Context(), number) for number in every], bar)
    return SampledTexts(
        {context: [[written[context, n] for n in group] for group in groups] for context in contexts},
        [[of_base[Context(), n] for n in group] for group in groups],
        {name: {s: [written[c, n] for n in few] for s, c in curve.items()} for name, curve in curves.items()},
    )
