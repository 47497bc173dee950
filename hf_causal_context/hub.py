"""The card of an adapter: what it is, how to use it, what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

_BODY = """---
{metadata}
---

# {title}

A causal context adapter for {base_text}, trained on interventional data with
[hf_causal_context](https://pypi.org/project/hf-causal-context/): an observational set and one set per concept. Its
concepts compose, in combinations never seen in training.

Concepts: {concepts}.{reweighted}

{picture}## Use

```python
from diffusers import DiffusionPipeline

from hf_causal_context import intervene, load_context_adapter
{setup}
pipe = load_context_adapter(pipe, {repo})
with intervene(pipe, {example}):
    {call}
```

{results}## Limits

Trained are strengths 0 and 1; others interpolate and extrapolate. An adapter knows the concepts it was trained on, on
the base it was trained for.

Method: Markham, Hirsch, Chang, Solus, Aragam, "Intervening to Learn and Compose Causally Disentangled Representations",
CLeaR 2026, [arXiv 2507.04754](https://arxiv.org/abs/2507.04754).
"""


def write_card(
    folder: Path,
    *,
    concepts: Sequence[str],
    base: str,
    call: str,
    setup: str | None = None,
    picture: str | None = None,
    reweighted: Sequence[str] = (),
    results: str = "",
) -> None:
    """Write README.md, the card that the Hub shows, over PEFT's generic one.

    Args:
        folder: the adapter's.
        concepts: its concepts.
        base: Hub id or folder of its base.
        call: Python code that calls `pipe` for a picture.
        setup: Python code that defines `pipe`; by default it loads `base`.
        picture: path of a sample grid inside the folder.
        reweighted: combinations that were trained on rows of single interventions.
        results: Markdown with what was measured.
    """
    local = Path(base).exists()
    metadata = ModelCardData(
        library_name="peft",
        base_model=None if local else base,
        base_model_relation=None if local else "adapter",
        tags=["causal-context", "hf_causal_context", "diffusers"],
    )
    example = "+".join(concepts[:2])
    names = ", ".join(f"`{context}`" for context in reweighted)
    text = _BODY.format(
        metadata=metadata.to_yaml(),
        title=folder.resolve().name,
        base_text=f"`{base}`" if not local else "a local diffusers pipeline",
        concepts=", ".join(f"`{concept}`" for concept in concepts),
        reweighted=f" Rows of single interventions stood for {names}." if names else "",
        picture=f"![Samples in each context]({picture})\n\n" if picture else "",
        setup=setup or f"\npipe = DiffusionPipeline.from_pretrained({_quoted(base)})",
        repo=_quoted(folder.name),
        example=_quoted(example),
        call=call,
        results=f"## Measured\n\n{results.strip()}\n\n" if results else "",
    )
    unfinished = folder / ".README.md.unfinished"
    ModelCard(text).save(unfinished)
    unfinished.replace(folder / "README.md")


def _quoted(text: str) -> str:
    """A Python string as formatters write it."""
    return json.dumps(text, ensure_ascii=False)
