"""What `hf-causal-context evaluate` does: load, evaluate, write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..contexts import Context
from ..generate import LANGUAGE_TASKS, load_adapted_base, stored_config
from ..training.load_data import load_data, load_text_data
from .arguments import EvaluationArguments
from .evaluator import evaluate
from .features import load_vision_features, require_torchmetrics
from .report import write_report
from .results import EvaluationReport


def evaluate_adapter(arguments: EvaluationArguments) -> tuple[EvaluationReport, list[Path]]:
    """Evaluate an adapter, of pictures or of texts, on its data; write the report, and return it with its files.

    Raises:
        ValueError, OSError, ImportError: see `load_data`, `load_adapted_base`, `load_adapted_language_model`,
            `load_vision_features`, `evaluate`, `evaluate_texts` and `write_report`.
    """
    language = stored_config(arguments.adapter).task_type in LANGUAGE_TASKS
    arguments.refuse_useless(language)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # one that cannot be written is found now
    contexts = None
    if (names := arguments.contexts) is not None:
        contexts = [Context() if name == arguments.observational_name else Context.parse(name) for name in names]
    numbers = {name: value for name in ("num_samples", "batch_size") if (value := getattr(arguments, name)) is not None}
    run = _evaluate_texts if language else _evaluate_pictures
    report = run(arguments, contexts, num_seeds=arguments.num_seeds, seed=arguments.seed, **numbers)
    sources = {"adapter": arguments.adapter, "data": arguments.train_data_dir or arguments.dataset_name}
    if not language:
        sources |= {"feature_extractor": arguments.feature_extractor}
    report = replace(report, settings=sources | report.settings)
    return report, write_report(report, folder)


def _evaluate_pictures(
    arguments: EvaluationArguments, contexts: Sequence[Context] | None, **options: Any
) -> EvaluationReport:
    if arguments.feature_extractor is not None:
        require_torchmetrics()
    data = load_data(arguments)
    base = load_adapted_base(
        arguments.adapter,
        arguments.pretrained_model_name_or_path,
        contexts=contexts or [],
        revision=arguments.revision,
        variant=arguments.variant,
        dtype=arguments.dtype,
    )
    extractor = None
    if arguments.feature_extractor is not None:
        extractor = load_vision_features(arguments.feature_extractor).to(next(base.denoiser.parameters()).device)
    return evaluate(
        base,
        data,
        contexts=contexts,
        num_inference_steps=arguments.num_inference_steps,
        prompt=arguments.prompt,
        class_label=arguments.class_label,
        guidance_scale=arguments.guidance_scale,
        resolution=arguments.resolution,
        feature_extractor=extractor,
        **options,
    )


def _evaluate_texts(
    arguments: EvaluationArguments, contexts: Sequence[Context] | None, **options: Any
) -> EvaluationReport:
    from ..generate_text import load_adapted_language_model
    from .text_evaluator import evaluate_texts

    data = load_text_data(replace(arguments, text_column=arguments.text_column or "text"))
    model, tokenizer = load_adapted_language_model(
        arguments.adapter,
        arguments.pretrained_model_name_or_path,
        contexts=contexts or [],
        revision=arguments.revision,
        dtype=arguments.dtype,
    )
    return evaluate_texts(
        model,
        tokenizer,
        data,
        contexts=contexts,
        prompt=arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        **options,
    )
