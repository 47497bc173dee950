"""Captions as they are trained on: left out at random, or with their tags in another order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..arguments import TrainingArguments
from ..noise import CAPTION, chance_of


def changed_captions(captions: Sequence[str], slots: Sequence[int], arguments: TrainingArguments) -> Iterator[str]:
    """Yield the captions of the samples in some slots as `caption_dropout` and `shuffle_tags` make them.

    Tags are what stands between commas.
    """
    for caption, slot in zip(captions, slots, strict=True):
        chance = chance_of(arguments.seed, slot, CAPTION)
        if chance.random() < arguments.caption_dropout:
            yield ""
        elif arguments.shuffle_tags:
            tags = [tag.strip() for tag in caption.split(",")]
            yield ", ".join(tags[place] for place in chance.permutation(len(tags)))
        else:
            yield caption
