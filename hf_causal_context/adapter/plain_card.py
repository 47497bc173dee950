"""The card of an adapter that was saved by PEFT's `save_pretrained`: what its config says, and how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .._files import CARD, complete_or_absent
from .._markdown import text_cell
from ..messages.installation import installation

# Cards with one of these may be replaced: PEFT's own, which says nothing, and this one.
_OF_PEFT, _MARK = (
    "[More Information Needed]",
    "<!-- Replaced at every save_pretrained, as long as this line is here. -->",
)
_TAGS = {"causal-context", "hf_causal_context"}
_TEXT = """
# A causal context adapter

{mark}

One adapter for the concepts {concepts}, which combine in any combination and at any strength. It is for {base}, and was
made with hf_causal_context, a PEFT method.

## Use

```sh
{installation}
```

```python
from peft import PeftModel
from hf_causal_context import intervene  # tells PEFT of the method

model = PeftModel.from_pretrained(base, "this folder or repository").eval()  # base: the model that it was trained on
with intervene(model, "{context}"):
    ...  # call the model
```

On a pipeline of diffusers: `pipe = load_context_adapter(pipe, "this folder or repository")`, of the same package, and
then `with intervene(pipe, "{context}")`. A list of contexts gives each sample of a batch its own, and without any the
model is the base, bit for bit.

Strength 1 is the intervention of the training data, 0 none; others interpolate and extrapolate.
Mechanism: `{mechanism}`, rank {rank} for each concept{observational}.

`hf-causal-context push --adapter FOLDER` makes a card with samples, data and measurements in place of this one.

## Limits

A combination is predicted from single interventions, and need not be right: look at those that you use, or measure them
(`hf-causal-context evaluate`). What went with a concept in the training data goes with it here.
"""


def is_replaceable(text: str) -> bool:
    """Whether a card is PEFT's own, or one that `replace_card` wrote."""
    return _OF_PEFT in text or _MARK in text


def replace_card(
    folder: Path, *, concepts: Sequence[str], base: str | None, mechanism: str, rank: int, observational_rank: int
) -> None:
    """Write a card in place of one that may be replaced; its metadata stay, but for a path of this machine."""
    path = folder / CARD
    if not path.is_file() or not is_replaceable(text := path.read_text(encoding="utf-8")):
        return
    local = base is not None and (Path(base).is_absolute() or Path(base).exists())
    data: Any = ModelCard(text, ignore_metadata_errors=True).data
    tags = {*(data.tags or ()), *_TAGS}
    if local:
        tags -= {f"base_model:adapter:{base}"}
        data.base_model = None
    data.tags = sorted(tags)
    shown = "the model that it was trained on" if not base else f"`{Path(base).name if local else base}`"
    body = _TEXT.format(
        mark=_MARK,
        installation=installation(),
        concepts=", ".join(f"*{text_cell(name)}*" for name in concepts),
        base=shown,
        context="+".join(concepts[:2]),
        mechanism=mechanism,
        rank=rank,
        observational=f", {observational_rank} for what is on in every context" if observational_rank else "",
    )
    with complete_or_absent(path) as unfinished:
        unfinished.write_text(f"---\n{data}\n---\n{body}", encoding="utf-8", newline="\n")
