"""The code on a card: what makes its samples, ready to be copied."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..bases.names import is_packaged

if TYPE_CHECKING:
    from .contents import CardContents

_PIPELINE = """import torch
from diffusers import DiffusionPipeline

from hf_causal_context import intervene, load_context_adapter

pipe = DiffusionPipeline.from_pretrained({base})
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
load_context_adapter(pipe, {repo}{revision})
with intervene(pipe, {context}):
    image = pipe({arguments}).images[0]
image.save({file})"""

_PACKAGED = """import torch

from hf_causal_context import intervene
from hf_causal_context.hub import load

pipe = load({repo}{revision})  # with its base, which is part of the package
with intervene(pipe, {context}):
    image = pipe({arguments}).images[0]
image.save({file})"""

# For class-conditional denoisers whose pipeline has no argument for the class.
_BY_CLASS = """from hf_causal_context.hub import load
from hf_causal_context.training.generation import generate, to_image

pipe = load({repo}{revision})
[[image]] = generate(pipe, [{context}], {arguments})
to_image(image).save({file})"""

_LANGUAGE = """import torch

import hf_causal_context  # before PEFT reads the adapter
from peft import {auto_class}
from transformers import AutoTokenizer

model = {auto_class}.from_pretrained({repo}{revision}{dtype}).eval()
model.to("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained({repo}{revision})
inputs = {inputs}.to(model.device)
torch.manual_seed({seed})
tokens = model.generate(**inputs, context={context}, {arguments})
print(tokenizer.decode(tokens[0{written}], skip_special_tokens=True))"""


def usage_code(contents: CardContents, repo: str, branch: str | None, context: str) -> str:
    """Python code that makes the card's sample of a context."""
    names = {"repo": python_literal(repo), "context": python_literal(context)}
    names["revision"] = f", revision={python_literal(branch)}" if branch else ""
    if contents.library == "transformers":
        encoder_decoder = contents.auto_class == "AutoPeftModelForSeq2SeqLM"
        return _LANGUAGE.format(
            **names,
            auto_class=contents.auto_class,
            dtype="" if contents.dtype == "float32" else f", dtype=torch.{contents.dtype}",
            inputs=contents.inputs,
            seed=contents.seed,
            arguments=_arguments(contents.call),
            written="" if encoder_decoder else ", inputs.input_ids.shape[1] :",
        )
    names["file"] = python_literal((contents.samples.get(context) or "image.png").rpartition("/")[2])
    if contents.class_label is not None:
        arguments = _arguments({"seeds": [contents.seed], "class_label": contents.class_label, **contents.call})
        return _BY_CLASS.format(**names, arguments=arguments)
    generator = f"generator=torch.Generator().manual_seed({contents.seed})"
    arguments = ", ".join(filter(None, [_arguments(contents.call), generator]))
    if is_packaged(contents.base):
        return _PACKAGED.format(**names, arguments=arguments)
    options = {key: value for key in ("revision", "variant") if (value := getattr(contents, key)) is not None}
    base = ", ".join(filter(None, [python_literal(contents.base), _arguments(options)]))
    base += f", dtype=torch.{contents.dtype}"  # unasked, parts of a base that was saved in half would stay so
    return _PIPELINE.format(**names, base=base, arguments=arguments)


def python_literal(text: str) -> str:
    """Return a Python string as formatters write it."""
    return json.dumps(text, ensure_ascii=False)


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={python_literal(v) if isinstance(v, str) else repr(v)}" for key, v in values.items())
