"""A small world of vectors in which everything about the concepts "a" and "b" is known."""

import torch

from hf_causal_context.contexts import Context, as_context
from hf_causal_context.evaluation.evaluator import evaluate_samples

CONCEPTS = ("a", "b")
OBS, A, B, PAIR = Context(), Context("a"), Context("b"), Context("a", "b")
CONTEXTS = (OBS, A, B, PAIR)
SHIFT = 4.0


def draw(num, context=(), seed=0, shift=SHIFT):
    """Rows (num, 4): noise, of which "a" shifts the first entry and "b" the second."""
    rows = torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))
    for k, name in enumerate(CONCEPTS):
        rows[:, k] += shift * as_context(context).strengths.get(name, 0.0)
    return rows


def real_rows(num=200):
    return {context: draw(num, context, seed=10 + n) for n, context in enumerate(CONTEXTS)}


def groups(context=(), seeds=(1, 2), num=60):
    """Seed groups of samples that are exactly right."""
    return [draw(num, context, seed=100 + seed) for seed in seeds]


def right_samples(contexts=CONTEXTS, **options):
    return {context: groups(context, **options) for context in contexts}


def report(samples=None, base=None, real=None, **options):
    """An evaluation of given, else right samples."""
    samples = right_samples() if samples is None else samples
    base = samples[OBS] if base is None else base
    return evaluate_samples(CONCEPTS, real_rows() if real is None else real, samples, base, **options)


def result_of(report, context):
    return next(result for result in report.contexts if result.context == str(context))
