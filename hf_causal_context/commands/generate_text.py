"""Texts in chosen contexts: what `hf-causal-context generate-text` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import complete_or_absent
from ..contexts import Context
from ..inference.adapted import StoredAdapter
from ..inference.texts import Prompt, generate_texts


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
    stored = StoredAdapter.open(
        adapter, pretrained_model_name_or_path, revision=revision, adapter_revision=adapter_revision, token=token
    )
    model, tokenizer = stored.language_model(parsed, dtype=dtype)
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
