"""What `hf-causal-context evaluate` does: load, evaluate, write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..contexts import Context
from ..generate import load_adapted_base
from ..training.load_data import load_data
from .arguments import EvaluationArguments
from .evaluator import evaluate
from .features import load_vision_features, require_torchmetrics
from .report import write_report
from .results import EvaluationReport


def evaluate_adapter(arguments: EvaluationArguments) -> tuple[EvaluationReport, list[Path]]:
    """Evaluate an adapter on its data, write the report, and return it with the paths of its files.

    Raises:
        ValueError, OSError, ImportError: see `load_data`, `load_adapted_base`, `load_vision_features`, `evaluate` and
            `write_report`.
    """
    if arguments.feature_extractor is not None:
        require_torchmetrics()
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # one that cannot be written is found now
    data = load_data(arguments)
    names = arguments.contexts
    contexts = None
    if names is not None:
        contexts = [Context() if name == arguments.observational_name else Context.parse(name) for name in names]
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
    report = evaluate(
        base,
        data,
        contexts=contexts,
        num_samples=arguments.num_samples,
        num_seeds=arguments.num_seeds,
        num_inference_steps=arguments.num_inference_steps,
        prompt=arguments.prompt,
        class_label=arguments.class_label,
        guidance_scale=arguments.guidance_scale,
        resolution=arguments.resolution,
        batch_size=arguments.batch_size,
        feature_extractor=extractor,
        seed=arguments.seed,
    )
    sources = {"adapter": arguments.adapter, "data": arguments.train_data_dir or arguments.dataset_name}
    sources |= {"feature_extractor": arguments.feature_extractor}
    report = replace(report, settings=sources | report.settings)
    return report, write_report(report, folder)
