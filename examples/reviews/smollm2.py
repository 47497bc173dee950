"""Do concepts compose on a real language model, whose base has never seen such data? SmolLM2-135M-Instruct.

    python -m examples.reviews.real_base --output_dir smollm2
    python -m examples.reviews.smollm2 --data_dir movie_reviews --base smollm2 --output_dir smollm2-compare

Film reviews as chats, in three styles made by rewriting (`chats.py`): emoji, pirate, shout. The model's own reviews are
essays; the data are lines in lower case. Every set has 600 rows, and pairs are never trained on. All methods have the
same rank per concept, number of steps, learning rate and schedule, and see as many rows in total, two of each set in a
step on average. (Ours begins with steps on the observational set alone, so its concepts see fewer rows than the LoRAs.)
Methods: our adapter with and without its observational part, stacked LoRAs (base + LoRA_a + LoRA_b), and these less the
LoRA of the observational set (base + LoRA_a + LoRA_b - LoRA_obs, `a+b-obs`).

Measured per context: the share of samples that show all its concepts, which rules tell exactly, and, for pairs, the
perplexity of true ones of 60 held-out sentences. Every training has a result file of its own, so that the same command
goes on after an interruption, and other --methods join the table. A step takes about four CPU seconds.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from hf_causal_context import Context
from hf_causal_context._files import complete_or_absent

from ..worlds.reviews import Sentence, read_sentences
from .chats import CONCEPTS, short, shown
from .methods import log_losses
from .smollm2_methods import METHODS, Study

ROWS_PER_SET = 600
HELD_OUT = 60  # sentences of true pairs
MAX_NEW_TOKENS = 56  # shouted reviews have up to 45
SINGLES = tuple(Context(name) for name in CONCEPTS)
PAIRS = tuple(a | b for a, b in combinations(SINGLES, 2))
CONTEXTS = (Context(), *SINGLES, *PAIRS)


@torch.no_grad()
def draw(model: Any, study: Study, num: int) -> list[str]:
    """Reviews by the model as it stands; the same random numbers in every context and method."""
    set_seed(0)
    prompt = torch.tensor([study.prompt()], device=model.device).expand(num, -1)
    drawn = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return study.tokenizer.batch_decode(drawn[:, prompt.shape[1] :], skip_special_tokens=True)


def perplexity(model: Any, study: Study, sentences: Sequence[Sentence], context: Context) -> float:
    """Perplexity of true reviews of a context, per token of the completions."""
    rows = study.tokens(sentences, context)
    prompt = study.prompt()
    sums, counts = log_losses(model, [[prompt[0], *row.ids[len(prompt) :].tolist()] for row in rows], prompt[1:])
    return math.exp(float(sums.sum() / counts.sum()))


def measure(model: Any, under: Any, study: Study, held_out: Sequence[Sentence], num: int) -> dict[str, dict[str, Any]]:
    """Per context: share of samples with all its concepts, and with each; perplexity of a pair; some samples."""
    results = {}
    for context in CONTEXTS:
        with under(context):
            texts = draw(model, study, num)
            found = {name: [shown(text, name) for text in texts] for name in CONCEPTS}
            requested = [found[name] for name in context.targets]
            results[str(context)] = {
                "share": float(np.mean(np.all(requested, axis=0))) if requested else math.nan,
                "each": {name: float(np.mean(values)) for name, values in found.items()},
                "perplexity": perplexity(model, study, held_out, context) if context in PAIRS else math.nan,
                "samples": texts[:3],
            }
    return results


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: means of singles and pairs, then what every context shows."""
    lines = [
        "| method | singles: shown | pairs: both shown | of its singles | true pairs: perplexity |",
        "|---|---|---|---|---|",
    ]
    for method, contexts in results.items():
        single, pair = (np.mean([contexts[str(c)]["share"] for c in some]) for some in (SINGLES, PAIRS))
        perplexities = [math.log(contexts[str(context)]["perplexity"]) for context in PAIRS]
        part = f"{pair / single:.2f}" if single else ""
        lines.append(f"| {method} | {single:.3f} | {pair:.3f} | {part} | {math.exp(np.mean(perplexities)):.2f} |")
    lines += ["", f"| shown | {' | '.join(map(str, CONTEXTS[1:]))} |", "|---|" + "---|" * len(CONTEXTS[1:])]
    for method, contexts in results.items():
        lines.append(f"| {method} | " + " | ".join(f"{contexts[str(c)]['share']:.2f}" for c in CONTEXTS[1:]) + " |")
    lines += [""]
    for method, contexts in results.items():
        lines += [f"- {method}, {c or 'obs'}: {json.dumps(v['samples'][0])}" for c, v in contexts.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--base", type=Path, default=Path("smollm2"))
    parser.add_argument("--output_dir", type=Path, default=Path("smollm2-compare"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--max_steps", type=int, default=110)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8, help="of each concept, and of each LoRA")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--num_samples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sentences = short(read_sentences(options.data_dir))
    study = Study(
        base=options.base,
        sentences=sentences[:-HELD_OUT][:ROWS_PER_SET],
        contexts=(Context(), *SINGLES),
        steps=options.max_steps,
        learning_rate=options.learning_rate,
        rank=options.rank,
        mixed_precision=options.mixed_precision,
        seed=options.seed,
    )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("methods", "output_dir")}
    results = {}
    for name in METHODS:
        done = options.output_dir / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        if done.exists():
            content = json.loads(done.read_text())
            if content["settings"] != settings:
                parser.error(
                    f"{done} was made with {content['settings']}, not {settings}. Choose another --output_dir."
                )
        elif name in options.methods:
            start = time.perf_counter()
            models = METHODS[name](study)
            seconds = {"train": time.perf_counter() - start}
            measured = {
                method: measure(model, under, study, sentences[-HELD_OUT:], options.num_samples)
                for method, (model, under) in models.items()
            }
            seconds["measure"] = time.perf_counter() - start - seconds["train"]
            content = {"settings": settings, "results": measured, "seconds": seconds}
            with complete_or_absent(done) as unfinished:
                unfinished.write_text(json.dumps(content, indent=1) + "\n")
            print(f"{name}: {seconds}", flush=True)
        else:
            continue
        results |= content["results"]
    text = table(results)
    print("\n" + text)
    with complete_or_absent(options.output_dir / "results.md") as unfinished:
        unfinished.write_text(text + "\n")


if __name__ == "__main__":
    main()
