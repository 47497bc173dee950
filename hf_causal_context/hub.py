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
{usage}
```

{results}## Limits

Trained are strengths 0 and 1; others interpolate and extrapolate. An adapter knows the concepts it was trained on, on
the base it was trained for.

Method: Markham, Hirsch, Chang, Solus, Aragam, "Intervening to Learn and Compose Causally Disentangled Representations",
CLeaR 2026, [arXiv 2507.04754](https://arxiv.org/abs/2507.04754).
"""

_BASES = {"diffusers": "diffusers pipeline", "transformers": "language model"}

_DIFFUSERS_USAGE = """from diffusers import DiffusionPipeline

from hf_causal_context import intervene, load_context_adapter
{setup}
pipe = load_context_adapter(pipe, {repo})
with intervene(pipe, {example}):
    {call}"""

_TRANSFORMERS_USAGE = """import hf_causal_context  # before PEFT reads the adapter
from peft import {auto_class}
from transformers import AutoTokenizer

model = {auto_class}.from_pretrained({repo})
tokenizer = AutoTokenizer.from_pretrained({repo})
inputs = {inputs}
texts = model.generate(**inputs, context={example}, do_sample=True, max_new_tokens=40)
print(tokenizer.batch_decode(texts, skip_special_tokens=True))"""


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
    """Write README.md, the card of a pipeline's adapter that the Hub shows, over PEFT's generic one.

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
    usage = _DIFFUSERS_USAGE.format(
        setup=setup or f"\npipe = DiffusionPipeline.from_pretrained({_quoted(base)})",
        repo=_quoted(folder.name),
        example=_quoted("+".join(concepts[:2])),
        call=call,
    )
    _save(
        folder,
        concepts,
        base,
        "diffusers",
        usage,
        reweighted,
        picture=f"![Samples in each context]({picture})\n\n" if picture else "",
        results=f"## Measured\n\n{results.strip()}\n\n" if results else "",
    )


def write_text_card(
    folder: Path,
    *,
    concepts: Sequence[str],
    base: str,
    auto_class: str,
    inputs: str,
    reweighted: Sequence[str] = (),
) -> None:
    """Write README.md, the card of a language model's adapter, over PEFT's generic one.

    Args:
        folder: the adapter's, with its tokenizer.
        concepts: its concepts.
        base: Hub id or folder of its base.
        auto_class: class of PEFT that loads it.
        inputs: Python code that calls `tokenizer` for the inputs.
        reweighted: combinations that were trained on rows of single interventions.
    """
    usage = _TRANSFORMERS_USAGE.format(
        auto_class=auto_class, repo=_quoted(folder.name), example=_quoted("+".join(concepts[:2])), inputs=inputs
    )
    _save(folder, concepts, base, "transformers", usage, reweighted)


def _save(
    folder: Path,
    concepts: Sequence[str],
    base: str,
    library: str,
    usage: str,
    reweighted: Sequence[str],
    picture: str = "",
    results: str = "",
) -> None:
    local = Path(base).exists()
    names = ", ".join(f"`{context}`" for context in reweighted)
    metadata = ModelCardData(
        library_name="peft",
        base_model=None if local else base,
        base_model_relation=None if local else "adapter",
        tags=["causal-context", "hf_causal_context", library],
    )
    text = _BODY.format(
        metadata=metadata.to_yaml(),
        title=folder.resolve().name,
        base_text=f"`{base}`" if not local else f"a local {_BASES[library]}",
        concepts=", ".join(f"`{concept}`" for concept in concepts),
        usage=usage,
        reweighted=f" Rows of single interventions stood for {names}." if names else "",
        picture=picture,
        results=results,
    )
    unfinished = folder / ".README.md.unfinished"
    ModelCard(text).save(unfinished)
    unfinished.replace(folder / "README.md")


def _quoted(text: str) -> str:
    """A Python string as formatters write it."""
    return json.dumps(text, ensure_ascii=False)
