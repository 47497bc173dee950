"""What a card shows of an adapter: samples of its contexts, read-outs, plain LoRAs; and how they were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._files import file_name
from .._random import seeded
from ..adapter.baking import adapter_config, save_baked
from ..adapter.effects import causal_effects
from ..bases.tokens import Tokenization
from ..contexts import Context
from ..errors import UserValueError
from ..messages.progress import ProgressBar
from .card_code import python_literal
from .contents import STRENGTHS, CardContents

SEEDS_OF_GRID = 4
_LONGEST_NAME = 50  # characters of a file's name; file systems count bytes, up to 255


def show_images(
    base: Any,
    folder: Path,
    contexts: Sequence[Context],
    *,
    seed: int,
    class_label: int | None,
    call: dict[str, Any],
) -> CardContents:
    """Write the images and LoRAs of a pipeline's adapter into a folder.

    Args:
        base: a `DiffusionBase` with its adapter.
        folder: takes pictures/, loras/ and influence.png.
        contexts: from `shown_contexts`.
        seed: of the samples.
        class_label: for class-conditional bases.
        call: arguments of `generate`: prompt, num_inference_steps, guidance_scale, resolution, num_frames.

    Raises:
        ValueError: for what `generate` refuses.
        OSError: for files that cannot be written.
    """
    from ..bases.images import image_grid, to_image
    from ..inference.export import export_contexts
    from ..inference.sampling import generate

    def sample(some: Sequence[Context], seeds: Sequence[int], batch_size: int = 8) -> list[torch.Tensor]:
        return generate(base, some, seeds=seeds, class_label=class_label, batch_size=batch_size, **call)

    (folder / "pictures").mkdir()
    paths = {context: f"pictures/{name}.png" for context, name in _file_names(contexts).items()}
    own = {context: sample([context], [seed], batch_size=1)[0] for context in contexts}  # as the card's code does
    for context, path in paths.items():
        to_image(own[context][0]).save(folder / path)
    more = sample(contexts, range(seed + 1, seed + SEEDS_OF_GRID))
    rows = [torch.cat([own[context], others]) for context, others in zip(contexts, more, strict=True)]
    image_grid(rows, [str(context) or "no intervention" for context in contexts]).save(folder / "pictures/grid.png")
    singles = [Context(name) for name in adapter_config(base.denoiser).concepts]
    steps = [Context({context.targets[0]: s}) for context in singles for s in STRENGTHS]
    made = [own.get(context, other) for context, other in zip(steps, sample(steps, [seed]), strict=True)]
    sweeps = [torch.cat(made[i : i + len(STRENGTHS)]) for i in range(0, len(made), len(STRENGTHS))]
    image_grid(sweeps, [str(context) for context in singles]).save(folder / "pictures/strengths.png")

    loras: list[Path] = []
    reason = None
    can_load = hasattr(base.pipe, "load_lora_weights")
    wanted = [str(context) for context in contexts if context]
    try:
        loras = export_contexts(base, wanted, folder / "loras", file_format="diffusers" if can_load else "peft")
    except UserValueError as error:  # not every adapter is linear
        reason = str(error)
    by_hook = class_label is not None and base.condition_argument is None  # no stock call passes the class
    given = {key: value for key, value in call.items() if value is not None}
    return CardContents(
        name="",
        library="diffusers",
        base="",
        pipeline_tag=base.pipeline_tag,
        call=given if by_hook else base.stock_call(class_label=class_label, **given),
        class_label=class_label if by_hook else None,
        seed=seed,
        prompt=call.get("prompt"),
        samples={str(context): path for context, path in paths.items()},
        grid="pictures/grid.png",
        strengths="pictures/strengths.png",
        influence=_draw_influence(base.denoiser, folder),
        loras={name: path.relative_to(folder).as_posix() for name, path in zip(wanted, loras, strict=bool(loras))},
        lora_format=("diffusers" if can_load else "peft") if loras else None,
        denoiser=base.denoiser_name,
        without_loras=reason,
        frame_rate=base.frame_rate if base.is_video else None,
    )


def _file_names(contexts: Sequence[Context]) -> dict[Context, str]:
    """Names of files of a length that file systems take, and different in more than case."""
    names: dict[Context, str] = {}
    taken = {"grid", "strengths"}  # what else is there
    for number, context in enumerate(contexts):
        name = file_name(str(context) or "obs")[:_LONGEST_NAME]
        if name.casefold() in taken:
            name = f"{name}-{number}"
        taken.add(name.casefold())
        names[context] = name
    return names


@torch.no_grad()
def show_texts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    contexts: Sequence[Context],
    *,
    seed: int,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
) -> CardContents:
    """Write the LoRAs of a language model's adapter into a folder, and let it write a text in each context.

    Raises:
        ValueError: for a prompt without tokens.
        OSError: for files that cannot be written.
    """
    encoder_decoder = bool(cast(Any, model).config.is_encoder_decoder)
    code, inputs = _inputs(tokenizer, prompt, chat, encoder_decoder)
    inputs = inputs.to(model.device)
    call: dict[str, Any] = {"do_sample": True, "max_new_tokens": max_new_tokens}
    texts = {}
    for context in ProgressBar(contexts, desc="write", unit="context"):
        with seeded(seed, model.device):
            tokens = cast(Any, model).generate(**inputs, context=context, **call)
        written = tokens[0] if encoder_decoder else tokens[0, inputs["input_ids"].shape[1] :]
        texts[str(context)] = cast(str, tokenizer.decode(written, skip_special_tokens=True))
    loras: dict[str, str] = {}
    reason = None
    try:
        for context, name in _file_names([context for context in contexts if context]).items():
            path = f"loras/{name}"
            save_baked(model, context, folder / path)
            loras[str(context)] = path
    except UserValueError as error:  # not every adapter is linear
        reason = str(error)
    return CardContents(
        name="",
        library="transformers",
        base="",
        pipeline_tag="text-generation",
        call=call,
        inputs=code,
        auto_class=f"AutoPeftModelFor{'Seq2SeqLM' if encoder_decoder else 'CausalLM'}",
        seed=seed,
        prompt=prompt,
        samples=texts,
        influence=_draw_influence(model, folder),
        loras=loras,
        lora_format="peft" if loras else None,
        without_loras=reason,
    )


def _inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, encoder_decoder: bool) -> tuple[str, Any]:
    """Python code that makes a model's inputs of a prompt, and what it makes."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        code = f"tokenizer.apply_chat_template({json.dumps(messages, ensure_ascii=False)}, add_generation_prompt=True, "
        code += 'return_dict=True, return_tensors="pt")'
        made = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return code, made
    column = "prompt" if encoder_decoder else "text"
    ids = Tokenization(tokenizer, column, encoder_decoder=encoder_decoder, max_length=10**9).beginning(prompt)
    text = prompt
    options: dict[str, Any] = {}
    if tokenizer(prompt)["input_ids"] != ids:  # begin with a special token, or without the one that ends a text
        text, options = cast(str, tokenizer.decode(ids)), {"add_special_tokens": False}
        if tokenizer(text, **options)["input_ids"] != ids:
            raise UserValueError(
                f"The prompt {prompt!r} cannot be shown as text for this tokenizer. Give another --prompt."
            )
    shown = "".join(f", {name}={value}" for name, value in options.items())
    code = f'tokenizer({python_literal(text)}{shown}, return_tensors="pt")'
    return code, tokenizer(text, return_tensors="pt", **options)


def _draw_influence(model: nn.Module, folder: Path) -> str | None:
    """Return an image of what the weights say: who acts on whom, or where nobody does, in which layers."""
    config = adapter_config(model)
    if config.expressive_depth:
        return None
    effects = causal_effects(model)
    try:
        draw = effects.plot_layers if config.mechanism == "independent" else effects.plot
        draw(folder / "influence.png")
    except ImportError as error:
        print(f"The card has no image of what the concepts change: {error}", flush=True)
        return None
    return "influence.png"
