"""The code on a card: what makes its samples, ready to be copied."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contents import CardContents

_PIPELINE = """import torch

from hf_causal_context import CausalContextPipeline, intervene

pipe = CausalContextPipeline.from_pretrained({repo}{options})  # with its base
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
with intervene(pipe, {context}):
    image = pipe({arguments}).images[0]
image.save({file})"""

_VIDEO = _PIPELINE.partition("    image =")[0].replace(
    "import torch\n", "import torch\nfrom diffusers.utils import export_to_video\n", 1
)
_VIDEO += """    video = pipe({arguments}).frames[0]
export_to_video(video, {file}, fps={frame_rate})"""

# For class-conditional denoisers whose pipeline has no argument for the class.
_BY_CLASS = """import torch

from hf_causal_context import CausalContextPipeline
from hf_causal_context.training.generation import generate, to_image

pipe = CausalContextPipeline.from_pretrained({repo}{options})  # with its base
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
[[image]] = generate(pipe, [{context}], {arguments})
to_image(image).save({file})"""

_LANGUAGE = """import torch
from transformers import AutoTokenizer

from hf_causal_context import AutoCausalContextModel

model = AutoCausalContextModel.from_pretrained({repo}{options}).eval()  # with its base
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
    variant = f", variant={python_literal(contents.variant)}" if contents.variant else ""
    # Unasked, another dtype than that of the samples could be the libraries' choice.
    names["options"] = f"{names['revision']}, dtype=torch.{contents.dtype}{variant}"
    if contents.library == "transformers":
        encoder_decoder = contents.auto_class == "AutoPeftModelForSeq2SeqLM"
        return _LANGUAGE.format(
            **names,
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
    if contents.frame_rate is not None:
        names["file"] = names["file"].replace(".png", ".mp4")
        return _VIDEO.format(**names, arguments=arguments, frame_rate=contents.frame_rate)
    return _PIPELINE.format(**names, arguments=arguments)


def python_literal(text: str) -> str:
    """Return a Python string as formatters write it."""
    return json.dumps(text, ensure_ascii=False)


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={python_literal(v) if isinstance(v, str) else repr(v)}" for key, v in values.items())
