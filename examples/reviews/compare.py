"""Do concepts of text compose? Our adapter beside stacked LoRAs, control tokens and steering vectors, in one run.

    python -m examples.reviews.compare --data_dir movie_reviews --base reviews-base --output_dir reviews-compare

Every method sees the observational set and one set per concept; pairs are never trained on, but by the oracle, which is
our adapter trained with them. Every set gives a method 16 rows in a step on average. (Ours begins with steps on the
observational set alone, so its concepts see fewer rows than the LoRAs; for the oracle, with more sets, they are fewer,
too.) Per context: the share of samples in which classifiers find all requested concepts, and the perplexity of true
reviews. Writes results.md, results.json and samples.md; the same command goes on after an interruption. `base.py` makes
the base, with --gap one that was pretrained on other texts.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from transformers import AutoTokenizer, set_seed

from hf_causal_context import ConceptSet, Context
from hf_causal_context._files import complete_or_absent

from ..worlds.reviews import CONCEPTS, Sentence, read_sentences, write_reviews
from .base import BEGIN, CONTEXTS, END, HELD_OUT_SENTENCES, PAIRS, SINGLES
from .methods import METHODS, Method, Setting, adapter, log_losses


def fit_classifiers(sentences: list[Sentence], unseen: list[Sentence]) -> tuple[dict[str, Pipeline], dict[str, float]]:
    """One classifier of characters per concept, and its balanced accuracy on true reviews of unseen sentences."""

    def labeled(some: list[Sentence], num: int, seed: int) -> tuple[list[str], np.ndarray]:
        sets = [write_reviews(some, num, context, seed + i) for i, context in enumerate(CONTEXTS)]
        return [text for texts, _ in sets for text in texts], np.concatenate([shown for _, shown in sets])

    (texts, shown), (others, truth) = labeled(sentences, 300, 1000), labeled(unseen, 300, 2000)
    classifiers, accuracies = {}, {}
    for k, concept in enumerate(CONCEPTS):
        characters = CountVectorizer(analyzer="char", ngram_range=(1, 2), lowercase=False, max_features=1500)
        pipeline = make_pipeline(characters, FunctionTransformer(np.log1p), LogisticRegression(max_iter=300))
        classifiers[concept] = pipeline.fit(texts, shown[:, k])
        accuracies[concept] = float(balanced_accuracy_score(truth[:, k], pipeline.predict(others)))
    return classifiers, accuracies


def measure(method: Method, setting: Setting, classifiers: Mapping[str, Pipeline], true: Mapping, num: int) -> dict:
    """Per context: share of samples with all its concepts, perplexity of true reviews, and some samples."""
    results = {}
    for context in CONTEXTS:
        control = method.prefix(context)
        with method.under(context), torch.no_grad():
            losses, counts = log_losses(method.model, true[context], control)
            set_seed(setting.seed)  # the same in every context and method
            begin = torch.tensor([[setting.tokenizer.bos_token_id, *control]]).expand(num, -1)
            drawn = method.model.generate(
                input_ids=begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, max_new_tokens=100
            )
        texts = setting.tokenizer.batch_decode(drawn[:, begin.shape[1] :], skip_special_tokens=True)
        found = [classifiers[name].predict(texts) for name in context.targets]
        share = float(np.mean(np.all(found, axis=0))) if found else math.nan
        results[str(context)] = {
            "share": share,
            "perplexity": math.exp(float(losses.sum() / counts.sum())),
            "samples": texts[:3],
        }
    return results


def table(results: Mapping[str, Mapping[str, dict]], accuracies: Mapping[str, float]) -> str:
    """Markdown: means over single interventions and over unseen pairs, then every pair."""

    def mean(method: str, key: str, contexts: list[Context]) -> float:
        values = [results[method][str(context)][key] for context in contexts]
        return float(np.mean(values)) if key == "share" else math.exp(float(np.mean(np.log(values))))

    lines = [
        "| method | singles: present | perplexity | unseen pairs: both present | of the oracle's | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for method in results:
        single, pair = mean(method, "share", SINGLES), mean(method, "share", PAIRS)
        lines.append(
            f"| {method} | {single:.3f} | {mean(method, 'perplexity', SINGLES):.2f} | {pair:.3f} "
            f"| {pair / mean('oracle', 'share', PAIRS):.2f} | {mean(method, 'perplexity', PAIRS):.2f} |"
        )
    lines += ["", "| both present / perplexity | " + " | ".join(map(str, PAIRS)) + " |", "|---|" + "---|" * len(PAIRS)]
    for method, contexts in results.items():
        cells = [f"{contexts[str(pair)]['share']:.2f} / {contexts[str(pair)]['perplexity']:.1f}" for pair in PAIRS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    judged = ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items())
    return "\n".join(
        [*lines, "", f"Balanced accuracy of the classifiers on true reviews of unseen sentences: {judged}."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--base", type=Path, default=Path("reviews-base"))
    parser.add_argument("--output_dir", type=Path, default=Path("reviews-compare"))
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sentences = read_sentences(options.data_dir)
    seen, unseen = sentences[:-HELD_OUT_SENTENCES], sentences[-HELD_OUT_SENTENCES:]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    setting = Setting(options.base, tokenizer, ConceptSet(CONCEPTS), options.max_steps, options.seed)

    def token_ids(some: list[Sentence], num: int, context: Context, seed: int) -> list[list[int]]:
        texts, _ = write_reviews(some, num, context, seed)
        assert tokenizer(texts[0]).input_ids[0] == tokenizer.convert_tokens_to_ids(BEGIN)
        return tokenizer([text + END for text in texts]).input_ids

    rows = {context: token_ids(seen, len(seen), context, 10 + i) for i, context in enumerate(CONTEXTS)}
    true = {context: token_ids(unseen, 2 * options.num_samples, context, 50 + i) for i, context in enumerate(CONTEXTS)}
    classifiers, accuracies = fit_classifiers(seen, unseen)
    given = {context: rows[context] for context in (Context(), *SINGLES)}
    runs = {name: (METHODS[name], given) for name in options.methods} | {"oracle": (adapter, rows)}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    stored = options.output_dir / "results.json"
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("methods", "output_dir")}
    results = {}
    if stored.exists():  # of a run that was interrupted
        before = json.loads(stored.read_text())
        if before["settings"] != settings:
            parser.error(f"{stored} was made with {before['settings']}. Choose another --output_dir.")
        results = before["results"]
    for name, (make, data) in runs.items():
        if name in results:
            continue
        start = time.perf_counter()
        method = make(setting, data)
        made = time.perf_counter()
        results[name] = measure(method, setting, classifiers, true, options.num_samples)
        with complete_or_absent(stored) as unfinished:
            unfinished.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
        shares = [np.mean([results[name][str(context)]["share"] for context in some]) for some in (SINGLES, PAIRS)]
        print(
            f"{name}: present {shares[0]:.3f} / {shares[1]:.3f} (singles / pairs); made in {made - start:.0f} s, "
            f"measured in {time.perf_counter() - made:.0f} s",
            flush=True,
        )
    text = table({name: results[name] for name in runs}, accuracies)
    print("\n" + text)
    with complete_or_absent(options.output_dir / "results.md") as unfinished:
        unfinished.write_text(text + "\n")
    samples = [
        f"- {name}, {context or 'obs'}: {json.dumps(values['samples'][0])}"
        for name in runs
        for context, values in results[name].items()
    ]
    with complete_or_absent(options.output_dir / "samples.md") as unfinished:
        unfinished.write_text("\n".join(samples) + "\n")


if __name__ == "__main__":
    main()
