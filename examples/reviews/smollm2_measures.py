"""What `smollm2.py` measures of a method: what its samples show, how fluent they are, how likely true reviews are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from hf_causal_context import Context

from ..worlds.reviews import Sentence
from .chats import CONCEPTS, kept, shown
from .methods import log_losses
from .smollm2_methods import Method, Study

MAX_NEW_TOKENS = 56  # shouted reviews have up to 45
LARGER_WINDOW = 96  # no true review is cut
SINGLES = tuple(Context(name) for name in CONCEPTS)
PAIRS = tuple(a | b for a, b in combinations(SINGLES, 2))
TRIPLE = Context(*CONCEPTS)
CONTEXTS = (*SINGLES, *PAIRS, TRIPLE)
STRENGTHS = (0.0, 0.25, 0.5, 0.75)  # and 1, which is measured anyway

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Ruler:
    """What all methods are measured with: true reviews, the untouched base, the number of samples."""

    study: Study
    held_out: Sequence[Sentence]
    base: Any
    num_samples: int

    def measure(self, method: Method) -> dict[str, Any]:
        """Per context: what samples show, how many are reviews; of pairs their fluency, and true ones' perplexity."""
        results: dict[str, Any] = {}
        for context in CONTEXTS:
            with method.under(context):
                texts, ended = self.draw(method, context)
                perplexity = self.perplexity(method, context) if context in PAIRS else math.nan
            found = {name: [shown(text, name) for text in texts] for name in CONCEPTS}
            results[str(context)] = {
                "share": float(np.mean(np.all([found[name] for name in context.targets], axis=0))),
                "each": {name: float(np.mean(values)) for name, values in found.items()},
                "kept": float(np.mean([kept(text, end) for text, end in zip(texts, ended, strict=True)])),
                "fluency": self.fluency(texts) if context in PAIRS else math.nan,
                "perplexity": perplexity,
                "samples": texts[:3],
            }
        return results

    def response(self, method: Method) -> dict[str, list[float]]:
        """Per concept: the share of samples that show it at each of the strengths."""
        shares: dict[str, list[float]] = {name: [] for name in CONCEPTS}
        weaker = [Context({name: strength}) for name in CONCEPTS for strength in STRENGTHS if strength]
        for context in (Context(), *weaker):
            with method.under(context):
                texts, _ = self.draw(method, context)
            for name in context.targets or CONCEPTS:
                shares[name].append(float(np.mean([shown(text, name) for text in texts])))
        return shares

    @torch.no_grad()
    def draw(self, method: Method, context: Context) -> tuple[list[str], list[bool]]:
        """Reviews, and which of them ended by themselves; the same random numbers in every context and method."""
        set_seed(0)
        tokenizer = self.study.tokenizer
        prompt = torch.tensor([self.study.beginning(method.prompt(context))], device=method.model.device)
        prompt = prompt.expand(self.num_samples, -1)
        drawn = method.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
        )[:, prompt.shape[1] :]
        ended = (drawn == method.model.generation_config.eos_token_id).any(1)
        return tokenizer.batch_decode(drawn, skip_special_tokens=True), ended.tolist()

    def perplexity(self, method: Method, context: Context) -> float:
        """Perplexity of true reviews of a context, per token of the completions."""
        prompt = method.prompt(context)
        beginning = self.study.beginning(prompt)
        rows = self.study.tokens(self.held_out, context, prompt, LARGER_WINDOW)
        return _perplexity(method.model, beginning, [row.ids[len(beginning) :].tolist() for row in rows])

    def fluency(self, texts: Sequence[str]) -> float:
        """Perplexity of samples under the untouched base."""
        tokens = [self.study.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return _perplexity(self.base, self.study.beginning(), tokens)


def _perplexity(model: Any, beginning: Sequence[int], texts: Sequence[list[int]]) -> float:
    sums, counts = log_losses(model, [[beginning[0], *text] for text in texts], beginning[1:])
    return math.exp(float(sums.sum() / counts.sum()))


def table(results: Mapping[str, Results], num_samples: int) -> str:
    """Markdown: means of singles and pairs, then what every context shows, then strengths."""
    lines = [
        "| method | singles: shown | pairs: both shown | of the oracle's | all three shown | singles: task kept "
        "| pairs: task kept | fluency | true pairs: perplexity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    best = _mean(results["oracle"], PAIRS, "share") if "oracle" in results else 0.0
    for method, contexts in results.items():
        pair = _mean(contexts, PAIRS, "share")
        error = math.sqrt(pair * (1 - pair) / (num_samples * len(PAIRS)))
        cells = [
            f"{_mean(contexts, SINGLES, 'share'):.3f}",
            f"{pair:.3f} ± {error:.3f}",
            f"{pair / best:.2f}" if best else "",
            f"{contexts[str(TRIPLE)]['share']:.3f}",
            f"{_mean(contexts, SINGLES, 'kept'):.3f}",
            f"{_mean(contexts, PAIRS, 'kept'):.3f}",
            f"{_geometric_mean(contexts, PAIRS, 'fluency'):.1f}",
            f"{_geometric_mean(contexts, PAIRS, 'perplexity'):.2f}",
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", f"| shown | {' | '.join(map(str, CONTEXTS))} |", "|---|" + "---|" * len(CONTEXTS)]
    for method, contexts in results.items():
        lines.append(f"| {method} | " + " | ".join(f"{contexts[str(c)]['share']:.2f}" for c in CONTEXTS) + " |")
    lines += [
        "",
        f"| shown at strength | {' | '.join(map(str, STRENGTHS))} | 1 |",
        "|---|" + "---|" * (1 + len(STRENGTHS)),
    ]
    for method, contexts in results.items():
        for name, shares in contexts.get("strengths", {}).items():
            cells = [f"{share:.2f}" for share in (*shares, contexts[name]["share"])]
            lines.append(f"| {method}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(results: Results, contexts: Sequence[Context], key: str) -> float:
    return float(np.mean([results[str(context)][key] for context in contexts]))


def _geometric_mean(results: Results, contexts: Sequence[Context], key: str) -> float:
    return math.exp(float(np.mean([math.log(results[str(context)][key]) for context in contexts])))
