"""What `smollm2.py` measures of a method: what its samples show, how fluent they are, how likely true reviews are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from hf_causal_context import Context
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.evaluation.classifiers import ConceptClassifier, balanced_accuracy, train_classifier
from hf_causal_context.evaluation.ngrams import Ngrams

from ..worlds.reviews import Sentence
from .chats import World, kept
from .methods import log_losses
from .smollm2_methods import Method, Study

MAX_NEW_TOKENS = 56  # shouted reviews have up to 45
LARGER_WINDOW = 96  # no true review is cut
STRENGTHS = (0.0, 0.25, 0.5, 0.75)  # and 1, which is measured anyway

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Ruler:
    """What all methods are measured with: true reviews, the untouched base, the number of samples."""

    study: Study
    held_out: Sequence[Sentence]
    base: Any
    num_samples: int

    @property
    def world(self) -> World:
        """The concepts."""
        return self.study.world

    @cached_property
    def classifier(self) -> tuple[Ngrams, ConceptClassifier]:
        """One for each concept, that has seen true reviews of all contexts, held-out ones too: it judges."""
        texts = {context: self._true(self.study.sentences, context) for context in (Context(), *self.world.contexts)}
        features = Ngrams(text for several in texts.values() for text in several)
        rows = {context: features(several) for context, several in texts.items()}
        return features, train_classifier(rows, ConceptSet(self.world.concepts), linear=True)

    def accuracy(self) -> str:
        """How well the classifiers tell true reviews of other sentences."""
        features, classifier = self.classifier
        contexts = (Context(), *self.world.contexts)
        logits = {context: classifier.read(features(self._true(self.held_out, context))) for context in contexts}
        accuracy = balanced_accuracy(logits, ConceptSet(self.world.concepts))
        told = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
        return f"Balanced accuracy of the classifiers on true reviews of held-out sentences: {told}."

    def _true(self, sentences: Sequence[Sentence], context: Context) -> list[str]:
        return [self.world.write(sentence, context) for sentence in sentences]

    def measure(self, method: Method) -> dict[str, Any]:
        """Per context: what samples show, how many are reviews; of pairs their fluency, and true ones' perplexity."""
        results: dict[str, Any] = {}
        features, classifier = self.classifier
        for context in self.world.contexts:
            paired = context in self.world.pairs
            with method.under(context):
                texts, ended = self.draw(method, context)
                perplexity = self.perplexity(method, context) if paired else math.nan
            found = {name: [self.world.shown(text, name) for text in texts] for name in self.world.concepts}
            columns = [self.world.concepts.index(name) for name in context.targets]
            results[str(context)] = {
                "share": float(np.mean(np.all([found[name] for name in context.targets], axis=0))),
                "classified": float((classifier.read(features(texts))[:, columns] > 0).all(1).float().mean()),
                "each": {name: float(np.mean(values)) for name, values in found.items()},
                "kept": float(np.mean([kept(text, end) for text, end in zip(texts, ended, strict=True)])),
                "fluency": self.fluency(texts) if paired else math.nan,
                "perplexity": perplexity,
                "samples": texts[:3],
            }
        return results

    def response(self, method: Method) -> dict[str, list[float]]:
        """Per concept: the share of samples that show it at each of the strengths."""
        shares: dict[str, list[float]] = {name: [] for name in self.world.concepts}
        weaker = [Context({name: strength}) for name in self.world.concepts for strength in STRENGTHS if strength]
        for context in (Context(), *weaker):
            with method.under(context):
                texts, _ = self.draw(method, context)
            for name in context.targets or self.world.concepts:
                shares[name].append(float(np.mean([self.world.shown(text, name) for text in texts])))
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


def table(results: Mapping[str, Results], world: World, num_samples: int) -> str:
    """Markdown: means of singles and pairs, then what every context shows, then strengths."""
    pairs = world.pairs
    lines = [
        "| method | singles: shown | pairs: both shown | of the oracle's | by classifiers | all three shown "
        "| singles: task kept | pairs: task kept | fluency | true pairs: perplexity |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    best = _mean(results["oracle"], pairs, "share") if "oracle" in results else 0.0
    for method, contexts in results.items():
        pair = _mean(contexts, pairs, "share")
        error = math.sqrt(pair * (1 - pair) / (num_samples * len(pairs)))
        cells = [
            f"{_mean(contexts, world.singles, 'share'):.3f}",
            f"{pair:.3f} ± {error:.3f}",
            f"{pair / best:.2f}" if best else "",
            # Results of before there were classifiers are kept.
            f"{_mean(contexts, pairs, 'classified'):.3f}" if "classified" in contexts[str(pairs[0])] else "",
            f"{_mean(contexts, world.triples, 'share'):.3f}",
            f"{_mean(contexts, world.singles, 'kept'):.3f}",
            f"{_mean(contexts, pairs, 'kept'):.3f}",
            f"{_geometric_mean(contexts, pairs, 'fluency'):.1f}",
            f"{_geometric_mean(contexts, pairs, 'perplexity'):.2f}",
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", f"| shown | {' | '.join(map(str, world.contexts))} |", "|---|" + "---|" * len(world.contexts)]
    for method, contexts in results.items():
        lines.append(f"| {method} | " + " | ".join(f"{contexts[str(c)]['share']:.2f}" for c in world.contexts) + " |")
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
