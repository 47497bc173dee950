"""Sample texts of a run: what the model writes in each context, from the same seeds.

Shapes: P tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from ..._markdown import table, text_cell
from ..._random import seeded
from ...bases.language import ONE_TEXT
from ...bases.tokens import Tokenization, filler, room_after
from ...contexts import Context
from ...data import InterventionalData
from ...data.text_rows import prompt_of
from ...errors import UserValueError
from ...messages.progress import ProgressBar
from ..arguments import TextArguments
from ..loop.checkpoints import write_text

_LOGGED_AS_TEXT = ("tensorboard", "wandb")  # trackers


def samples_name(step: int) -> str:
    """Return the file of the sample texts in the folder of the run."""
    return f"samples/step-{step:06d}.md"


def sample_prompt(
    model: PreTrainedModel, data: InterventionalData, tokenize: Tokenization, arguments: TextArguments
) -> list[int]:
    """Tokens (P,) that the sample texts follow: of `validation_prompt`, by default of the first row's prompt.

    A model of texts without prompts begins with its beginning- or end-of-sequence token.

    Raises:
        ValueError: where there is nothing to begin with, or no room after it.
    """
    prompt = prompt_of(next(iter(data.rows)), data.content_column, arguments.validation_prompt)
    ids = tokenize.beginning(prompt)
    if room_after(model, ids) < 1:
        raise UserValueError(
            f"The prompt of the sample texts has {len(ids)} tokens, which leaves no room for an answer. Give a shorter "
            "--validation_prompt, or --num_validation_texts 0."
        )
    return ids


@torch.no_grad()
def sample_texts(
    model: PeftModel,
    tokenize: Tokenization,
    prompt: Sequence[int],
    contexts: Sequence[Context],
    arguments: TextArguments,
) -> list[list[str]]:
    """Texts for each context, drawn with the same random numbers; the random state of the run stays as it was."""
    ids = torch.tensor([list(prompt)] * arguments.num_validation_texts, device=model.device)
    room = min(arguments.max_new_tokens, room_after(model, prompt))
    texts = []
    for context in ProgressBar(contexts, desc="write", unit="context", delay=0):
        with seeded(arguments.seed, model.device):
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                context=context,
                do_sample=True,
                max_new_tokens=room,
                pad_token_id=filler(tokenize.tokenizer),
                tokenizer=tokenize.tokenizer,  # for strings at which the base stops
                **ONE_TEXT,
            )
        written = output if tokenize.encoder_decoder else output[:, len(prompt) :]
        texts.append(tokenize.tokenizer.batch_decode(written, skip_special_tokens=True))
    return texts


def write_texts(
    accelerator: Accelerator,
    output_dir: str,
    prompt: str,
    texts: Sequence[Sequence[str]],
    labels: Sequence[str],
    step: int,
) -> None:
    """In the main process, write a table with a labeled row per context, and show it to trackers that take text.

    Raises:
        CheckpointError: when the file cannot be written.
    """
    if not accelerator.is_main_process:
        return
    lines = [f"Prompt: {text_cell(prompt)}", ""] if prompt else []
    header = ("context", *map(str, range(1, len(texts[0]) + 1)))
    lines += table(header, [(label, *map(text_cell, row)) for label, row in zip(labels, texts, strict=True)])
    content = "\n".join(lines) + "\n"
    write_text(Path(output_dir, samples_name(step)), Path(output_dir), content)
    for tracker in accelerator.trackers:
        if tracker.name in _LOGGED_AS_TEXT:
            tracker.log({"samples": content}, step=step)
