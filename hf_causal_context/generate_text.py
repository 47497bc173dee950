"""Texts in chosen contexts: what `hf-causal-context generate-text` does.

Shapes: B contexts, P tokens of the prompt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .adapter.compatibility import check_fits
from .adapter.export import context_strengths
from .adapter.intervening import intervene
from .adapter.saving import complete_or_absent
from .adapter.stored import AdapterError, download, read_header, read_weights
from .contexts import Context
from .generate import LANGUAGE_TASKS, base_of, config_in
from .training.language import load_language_model
from .training.tokens import Tokenisation, known_positions, room_after

Prompt = str | Sequence[Mapping[str, str]]


def generate_text_file(
    adapter: str,
    contexts: Sequence[str],
    output_file: Path,
    *,
    prompt: str,
    seeds: Sequence[int],
    max_new_tokens: int,
    chat: bool = False,
    greedy: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    pretrained_model_name_or_path: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    observational_name: str = "obs",
    adapter_revision: str | None = None,
    token: str | bool | None = None,
) -> list[dict[str, Any]]:
    """Write one JSON line per seed and context, and return them: {"context", "seed", "prompt", "text"}.

    Args:
        chat: the prompt is what a user says, in the tokenizer's chat template.
        greedy: one text per context, without random draws; their "seed" is null.

    Raises:
        ValueError: for another kind of adapter, unknown concepts, or what `generate_texts` refuses.
        OSError: for an adapter or base that cannot be read, or a file that cannot be written.
    """
    if greedy and (temperature, top_p) != (None, None):
        raise ValueError(
            "--greedy draws nothing, so --temperature and --top_p have no effect. Leave one or the other out."
        )
    if output_file.is_dir():
        raise IsADirectoryError(f"--output_file {output_file} is a folder. Give a file in it, such as texts.jsonl.")
    parsed = [Context() if name == observational_name else Context.parse(name) for name in contexts]
    model, tokenizer = load_adapted_language_model(
        adapter,
        pretrained_model_name_or_path,
        contexts=parsed,
        revision=revision,
        dtype=dtype,
        adapter_revision=adapter_revision,
        token=token,
    )
    prompts: list[Prompt] = [[{"role": "user", "content": prompt}] if chat else prompt]
    lines = []
    for seed in (None,) if greedy else seeds:
        [texts] = generate_texts(
            model,
            tokenizer,
            prompts,
            parsed,
            max_new_tokens=max_new_tokens,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
        )
        lines += [
            {"context": str(context) or observational_name, "seed": seed, "prompt": prompt, "text": text}
            for context, text in zip(parsed, texts, strict=True)
        ]
    with complete_or_absent(output_file) as unfinished:
        unfinished.write_text("".join(map(json_line, lines)), encoding="utf-8")
    return lines


def json_line(row: Mapping[str, Any]) -> str:
    """A row of the file, with its newline."""
    return json.dumps(row, ensure_ascii=False) + "\n"


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    contexts: Sequence[Context],
    *,
    max_new_tokens: int,
    seed: int | None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> list[list[str]]:
    """What the model writes after each prompt in each context, without the prompt: one list of texts per prompt.

    The contexts of a prompt are one batch, so nothing is padded. Its draws depend on the seed, on the prompt and on
    which contexts there are; the random state of the caller stays as it was.

    Args:
        model: with a causal context adapter.
        tokenizer: its tokenizer.
        prompts: texts, or lists of messages for the tokenizer's chat template.
        contexts: () is the observational one.
        max_new_tokens: length of the texts.
        seed: of the draws; None takes the likeliest token each time.
        temperature: of the draws; None leaves the model's own setting, as does None for the next.
        top_p: share of the probability that is drawn from.

    Raises:
        ValueError: for a prompt without tokens, one that leaves too little room, or unknown concepts.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    encoder_decoder = bool(cast(Any, model).config.is_encoder_decoder)
    column = "prompt" if encoder_decoder else "text"
    tokenise = Tokenisation(tokenizer, column, encoder_decoder=encoder_decoder, max_length=sys.maxsize)
    prompt_ids = [tokenise.beginning(prompt) for prompt in prompts]
    for ids in prompt_ids:
        _check_room(model, ids, max_new_tokens, encoder_decoder)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": seed is not None}
    options |= {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value is not None}
    # What follows the end of shorter texts; nothing is padded before.
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    results = []
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        intervene(model, contexts),
    ):
        for ids in prompt_ids:
            batch = torch.tensor([ids] * len(contexts), device=model.device)
            if seed is not None:
                torch.manual_seed(seed)
            output = cast(Any, model).generate(
                input_ids=batch, attention_mask=torch.ones_like(batch), pad_token_id=filler, **options
            )
            written = output if encoder_decoder else output[:, len(ids) :]
            results.append(tokenizer.batch_decode(written, skip_special_tokens=True))
    return results


def _check_room(model: PreTrainedModel | PeftModel, ids: Sequence[int], new: int, encoder_decoder: bool) -> None:
    known = known_positions(model)
    if known is None:
        return
    if encoder_decoder and len(ids) > known:
        raise ValueError(f"The prompt has {len(ids)} tokens, and the model reads {known}. Shorten it.")
    room = room_after(model, ids)
    if room < 1:
        raise ValueError(f"The prompt has {len(ids)} tokens, and the model knows {known} positions. Shorten it.")
    if new > room:
        raise ValueError(
            f"The model knows {known} positions, and the prompt has {len(ids)} tokens, so max_new_tokens={new} is too "
            f"much. Give at most {room}."
        )


def load_adapted_language_model(
    adapter: str,
    pretrained_model_name_or_path: str | None = None,
    *,
    contexts: Sequence[Context] = (),
    revision: str | None = None,
    dtype: str = "float32",
    adapter_revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter's base, by default the one it names, with the adapter attached, onto the GPU if there is one.

    The tokenizer is the adapter's, if it comes with one, else the base's.

    Args:
        adapter: a folder, or the id of a repository on the Hub.
        revision: of the base.
        adapter_revision: of the adapter's repository.
        token: for an adapter's private repository, as in huggingface_hub.

    Raises:
        ValueError: for another kind of adapter or base, or contexts with concepts that the adapter lacks.
        OSError: for an adapter or base that cannot be read.
    """
    folder = download(adapter, revision=adapter_revision, token=token, tokenizer=True)
    config = config_in(folder, adapter)
    library = (config.auto_mapping or {}).get("parent_library") or ""
    if library.startswith("diffusers"):
        raise ValueError(
            f"{adapter} is an adapter of a diffusion model. `hf-causal-context generate` makes pictures with it."
        )
    if config.task_type is not None and config.task_type not in LANGUAGE_TASKS:
        raise ValueError(f"{adapter} is an adapter for {config.task_type}, which writes no texts.")
    base_name, revision = base_of(adapter, config, pretrained_model_name_or_path, revision)
    context_strengths(config, contexts)  # refuses what the adapter does not have before anything is loaded
    tensors = read_header(folder, config, adapter)
    model = load_language_model(base_name, revision, getattr(torch, dtype))
    own = (folder / "tokenizer_config.json").is_file()
    source, its_revision = (str(folder), None) if own else (base_name, revision)
    tokenizer = cast(PreTrainedTokenizerBase, _tokenizer(source, its_revision, adapter if own else None))
    check_fits(model, config, tensors, adapter)
    read_weights(folder, adapter)  # refuses values that PEFT would load
    adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    return adapted.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _tokenizer(source: str, revision: str | None, adapter: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # its files may hold anything, and transformers raises anything
        if adapter is None:
            raise
        raise AdapterError(
            f"The tokenizer of {adapter} cannot be read ({type(error).__name__}: {error}). Take tokenizer*.json out of "
            "its folder to use the tokenizer of its base."
        ) from error
