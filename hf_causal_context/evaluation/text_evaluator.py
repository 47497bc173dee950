"""Does it compose, in texts? What a language model's adapter writes, beside real texts of the same contexts.

Classifiers of characters and words read the texts; perplexities of real texts stand where images have distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..bases.token_batches import Collation
from ..bases.tokens import Prompt, Tokenization, filler, room_after, row_length
from ..contexts import ConceptSet, Context, ContextLike, as_context
from ..data import InterventionalData
from ..data.text_rows import prompt_of
from ..errors import UserValueError
from ..inference.sampling import eval_mode
from .asked import adapter_concepts, contexts_to_sample
from .evidence import EvaluationInputs, check_real_rows
from .judges import Judge, Judged
from .measurement import measure
from .ngrams import Ngrams
from .readings import Measurements
from .real_texts import RealTexts, perplexities, read_real_texts, shortened, usual_length
from .results import EvaluationReport, Perplexity
from .text_sampling import SampledTexts, TextSampler, sample_all_texts

MAX_PROMPTS = 32
_SHOWN_TEXTS = 3  # per context
_NO_ADAPTER = (
    "This language model has no causal context adapter. Load one first: "
    "AutoPeftModelForCausalLM.from_pretrained(folder)."
)


def evaluate_texts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: InterventionalData,
    *,
    contexts: Sequence[ContextLike] | None = None,
    num_samples: int = 64,
    num_seeds: int = 3,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    judge: Judge | None = None,
    max_length: int | None = None,
    completion_only: bool | None = None,
    assistant_only: bool = False,
) -> EvaluationReport:
    """Sample a language model's adapter in the contexts of interventional texts, and compare.

    Samples follow the prompts of observational rows, the same in every context, with the model's own settings of
    sampling; plain texts begin at their beginning. The classifiers read what a model is to write (completions, last
    messages, plain texts), cut to the length of the samples.

    Args:
        model: with its adapter.
        tokenizer: the model's.
        data: the texts it was trained on, with combinations held out.
        contexts: the combinations; by default all with real rows, or some pairs if there are none to compare with.
        num_samples: texts per context and seed group.
        num_seeds: seed groups; two or more give confidence intervals.
        prompt: that all samples follow, instead of the rows' own; where rows hold messages it is a user's.
        max_new_tokens: length of the samples; by default of the real texts.
        batch_size: texts at once.
        seed: of the classifiers and of the splits of the real texts.
        judge: reads one text and answers with numbers by name, such as {"loud": 1.0}; names of concepts are read in
            the strength curves, too. Real texts and samples are read alike.
        max_length: tokens of a row that the training read; perplexities are those of what it learned.
        completion_only: whether it learned completions only, as for `Tokenization`.
        assistant_only: whether it learned the assistant's messages only.

    Raises:
        ValueError: for a model without an adapter, other concepts than the data's, unknown contexts, too few real
            rows, rows that cannot be tokenized, a prompt without tokens or room after it, or answers of the judge that
            are not numbers by name.
    """
    concepts = adapter_concepts(model, data, _NO_ADAPTER)
    wanted = None if contexts is None else list(map(as_context, contexts))
    concepts.strengths(wanted or [])  # refuses unknown names
    if num_samples < 2 or num_seeds < 1:
        raise UserValueError(f"num_samples={num_samples} must be at least 2 and num_seeds={num_seeds} at least 1.")
    base = cast(Any, model.get_base_model())
    encoder_decoder = bool(base.config.is_encoder_decoder)
    tokenize = Tokenization(
        tokenizer,
        data.content_column,
        encoder_decoder=encoder_decoder,
        max_length=row_length(base, max_length),
        completion_only=completion_only,
        assistant_only=assistant_only,
    )
    real = read_real_texts(data, tokenize, seed)
    check_real_rows(concepts, {context: len(own) for context, own in real.items()})
    trained = frozenset(map(Context.parse, data.contexts))
    asked, notes = contexts_to_sample(concepts, wanted, real, trained)
    prompts = _prompts(data, real[Context()], prompt)
    room = min(room_after(base, tokenize.beginning(each)) for each in prompts)
    length = max_new_tokens or int(max(1, min(room, usual_length(real, tokenize))))
    # A prompt of plain texts is how they begin; others are not what the model writes.
    sampler = TextSampler(model, tokenizer, prompts, length, batch_size, with_prompt=data.content_column == "text")
    collate = Collation(
        filler(tokenizer),
        model.device,
        decoder_inputs=base.prepare_decoder_input_ids_from_labels if encoder_decoder else None,
    )
    shown = {context: shortened(own.texts, tokenize, length) for context, own in real.items()}
    judged = None if judge is None else Judged(judge)
    # Before samples are drawn: an answer that is of no use is an error.
    of_real = {} if judged is None else {context: judged(_stripped(texts)) for context, texts in shown.items()}
    with eval_mode(model):  # one that was just trained would drop features
        scores = perplexities(model, real, collate, concepts, batch_size)
        sampled = sample_all_texts(sampler, concepts, asked, num_samples, num_seeds)
    report = measure(_evidence(concepts, shown, sampled, trained, scores, judged, of_real), seed)
    settings = {
        "num_samples": num_samples,
        "num_seeds": num_seeds,
        "prompt": prompt,
        "max_new_tokens": length,
        "perplexity_of": tokenize.learned,
        "seed": seed,
    }
    texts = {
        str(context): (shown.get(context, [])[:_SHOWN_TEXTS], groups[0][:_SHOWN_TEXTS])
        for context, groups in sampled.samples.items()
    }
    return replace(report, notes=(*report.notes, *notes), settings=settings, texts=texts)


def _prompts(data: InterventionalData, observational: RealTexts, given: str | None) -> list[Prompt]:
    """Different ones, of observational rows."""
    if given is not None or data.content_column == "text":
        return [prompt_of(next(iter(data.rows)), data.content_column, given or "")]
    different = {str(each): each for each in observational.prompts}
    return list(different.values())[:MAX_PROMPTS]


def _evidence(
    concepts: ConceptSet,
    real: Mapping[Context, Sequence[str]],
    sampled: SampledTexts,
    trained: frozenset[Context],
    scores: Mapping[Context, Perplexity],
    judged: Judged | None,
    of_real: Mapping[Context, Tensor],
) -> EvaluationInputs:
    # Of the base, too: what no real text holds tells its texts apart.
    ngrams = Ngrams(text for texts in (*real.values(), *sampled.base) for text in texts)

    def read(texts: Sequence[str], attributes: Tensor | None = None) -> Measurements:
        texts = _stripped(texts)
        values = ngrams(texts)
        if judged is not None and attributes is None:
            attributes = judged(texts)
        return Measurements(values, attributes, None, values[:0])

    return EvaluationInputs(
        concepts=concepts,
        real={context: read(texts, of_real.get(context)) for context, texts in real.items()},
        samples={context: [read(texts) for texts in groups] for context, groups in sampled.samples.items()},
        base=[read(texts) for texts in sampled.base],
        strengths={
            name: {strength: read(texts) for strength, texts in curve.items()}
            for name, curve in sampled.strengths.items()
        },
        trained=trained,
        largest_change=0.0,
        mean_change=0.0,
        attribute_names=() if judged is None else judged.names,
        perplexities=scores,
    )


def _stripped(texts: Sequence[str]) -> list[str]:
    """Texts without the space between prompt and completion: some tokenizers lose it where a completion is alone."""
    return [text.lstrip(" ") for text in texts]
