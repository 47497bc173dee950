"""`hf-causal-context evaluate`: measures an adapter on its data, and writes a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import ARGUMENTS
from ..contexts import Context
from ..data.arguments import AnyDataArguments, argument, refuse_useless
from ..errors import UserValueError
from ..evaluation.calibrating import MIN_ROWS, check_rows
from .adapter_arguments import ADAPTER, BaseWeights, parse_contexts
from .replaced import told_replacements

if TYPE_CHECKING:
    from ..evaluation.results import EvaluationReport
    from ..inference.adapted import StoredAdapter

_MINIMA = {
    "num_samples": 2,
    "num_seeds": 1,
    "num_inference_steps": 1,
    "max_new_tokens": 1,
    "batch_size": 1,
    "resolution": 1,
    "seed": 0,
}
_IMAGES_ONLY = (
    *("image_column", "caption_column", "mask_column", "pair_column", "paired_files", "class_column", "num_frames"),
    *("variant", "num_inference_steps", "class_label", "guidance_scale", "resolution", "feature_extractor"),
)
_TEXTS_ONLY = ("text_column", "max_new_tokens", "judge")


@dataclass
class Arguments(BaseWeights, AnyDataArguments):
    """Settings of one evaluation; those of the data are the training's.

    Raises:
        ValueError: for a number out of range, or without an adapter or output folder.
    """

    adapter: str = argument("", f"Required. {ADAPTER}")
    output_dir: str = argument("", "Required. Folder for the report.")
    pretrained_model_name_or_path: str | None = argument(None, "Its base; by default the one it names.")
    revision: str | None = argument(None, "Revision of the base on the Hub.")
    variant: str | None = argument(None, "Variant of the base's files, such as fp16.")

    contexts: list[str] | None = argument(
        None,
        "Combinations to evaluate; by default all that the data holds. obs and single concepts always are.",
        aliases=["--context"],
    )
    num_samples: int | None = argument(None, "Samples per context and seed group: 256 images, or 64 texts.")
    num_seeds: int = argument(3, "Seed groups; two or more give confidence intervals.")
    num_inference_steps: int = argument(25, "Denoising steps.")
    prompt: str | None = argument(
        None, "For bases that take text: by default the training's. Texts follow those of their rows by default."
    )
    max_new_tokens: int | None = argument(None, "Length of sample texts; by default that of the real ones.")
    class_label: int | None = argument(None, "For class-conditional bases.")
    guidance_scale: float | None = argument(None, "By default the pipeline's.")
    resolution: int | None = argument(None, "Side of the images in pixels; by default the training's.")
    batch_size: int | None = argument(None, "Samples at once: 8 images, or 32 texts.")
    feature_extractor: str | None = argument(
        None, "For FID and KID: a transformers vision model, such as facebook/dinov2-small."
    )
    judge: str | None = argument(
        None, 'For texts: your own function by its dotted name, my_module.judge: text -> {"loud": 1.0, "formal": 0.0}.'
    )
    calibrate: bool = argument(
        False, "Store a dial per concept with the adapter, of which equal steps are equal changes; for --calibrated."
    )
    seed: int = argument(0, "Of the classifiers and of the splits of the real rows.")

    def __post_init__(self) -> None:
        if missing := ", ".join(f"--{name}" for name in ("adapter", "output_dir") if not getattr(self, name)):
            raise UserValueError(f"Missing: {missing}. Give the adapter and the folder for the report.")
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise UserValueError(f"--{name}={value} must be at least {minimum}.")
        if self.calibrate and self.num_samples is not None and self.num_samples < MIN_ROWS:
            raise UserValueError(f"--num_samples={self.num_samples} must be at least {MIN_ROWS} for --calibrate.")

    def check_kind(self, language: bool) -> None:
        """Refuse settings that an adapter of this kind does not have.

        Raises:
            ValueError: naming them.
        """
        kind = "language model" if language else "diffusers pipeline"
        refuse_useless(self, _IMAGES_ONLY if language else _TEXTS_ONLY, f"{self.adapter} is an adapter of a {kind}")


def run(arguments: Arguments) -> None:
    """Evaluate, and print the report, its files and its verdict; see `evaluate_adapter` for what it raises."""
    from ..evaluation.markdown import markdown

    report, paths = evaluate_adapter(arguments)
    print(f"\n{markdown(report)}")
    for path in paths:
        print(path)
    if arguments.calibrate:
        print(f"\n{calibrate(Path(arguments.adapter), report)}")
    print("\n" + "\n".join(f"- {sentence}" for sentence in report.verdict.sentences))


def calibrate(folder: Path, report: EvaluationReport) -> str:
    """Store calibrations with the adapter in a folder, and return what they are, in words.

    Raises:
        ValueError: if no concept can be calibrated.
        OSError: for a folder that cannot be written.
    """
    from .._markdown import table
    from ..adapter.calibration import store_calibration
    from ..evaluation.calibrating import calibrations
    from ..inference.pipelines import adapter_places

    found, problems = calibrations(report)
    store_calibration(folder, adapter_places(), found)
    rows = [(name, ", ".join(f"{dial:.2f} -> {strength:g}" for dial, strength in found[name])) for name in found]
    lines = ["Calibrated, and stored with the adapter; --calibrated and intervene(..., calibrated=True) use it.", ""]
    return "\n".join([*lines, *table(("concept", "dial -> strength"), rows), *(f"- {each}" for each in problems)])


def evaluate_adapter(arguments: Arguments) -> tuple[EvaluationReport, list[Path]]:
    """Evaluate an adapter, of images or of texts, on its data; write the report, and return it with its files.

    Raises:
        ValueError, OSError, ImportError: see `load_data`, `StoredAdapter`, `load_vision_features`, `evaluate`,
            `evaluate_texts` and `write_report`.
    """
    from ..evaluation.report import write_report
    from ..inference.adapted import StoredAdapter

    adapter = StoredAdapter.open(
        arguments.adapter, arguments.pretrained_model_name_or_path, revision=arguments.revision
    )
    language = adapter.is_of_language_model
    if arguments.calibrate and not Path(arguments.adapter).is_dir():
        raise UserValueError(
            f"--calibrate writes into the adapter's folder, and {arguments.adapter} is on the Hub. Download it first, "
            "and push it again afterwards."
        )
    arguments.check_kind(language)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # one that cannot be written is found now
    names = arguments.contexts
    contexts = None if names is None else parse_contexts(names, arguments.observational_name)
    numbers = {name: value for name in ("num_samples", "batch_size") if (value := getattr(arguments, name)) is not None}
    run = _evaluate_texts if language else _evaluate_images
    report = run(adapter, arguments, contexts, num_seeds=arguments.num_seeds, seed=arguments.seed, **numbers)
    sources = {"adapter": arguments.adapter, "data": arguments.train_data_dir or arguments.dataset_name}
    sources |= {"judge": arguments.judge} if language else {"feature_extractor": arguments.feature_extractor}
    report = replace(report, settings=sources | report.settings)
    with told_replacements(folder) as paths:
        paths += write_report(report, folder)
    return report, paths


def _evaluate_images(
    adapter: StoredAdapter, arguments: Arguments, contexts: Sequence[Context] | None, **options: Any
) -> EvaluationReport:
    from ..data.from_arguments import load_data
    from ..evaluation.asked import check_concepts
    from ..evaluation.evaluator import evaluate
    from ..evaluation.features import load_vision_features, require_torchmetrics

    if arguments.feature_extractor is not None:
        require_torchmetrics()
    data = load_data(arguments)
    check_concepts(adapter.config.concepts, data)
    if arguments.calibrate:
        check_rows(data)
    extractor = None if arguments.feature_extractor is None else load_vision_features(arguments.feature_extractor)
    base = adapter.pipeline(contexts or (), variant=arguments.variant, **arguments.weights)
    if extractor is not None:
        extractor = extractor.to(next(base.denoiser.parameters()).device)
    return evaluate(
        base,
        data,
        contexts=contexts,
        num_inference_steps=arguments.num_inference_steps,
        class_label=arguments.class_label,
        guidance_scale=arguments.guidance_scale,
        feature_extractor=extractor,
        **trained_with(adapter, arguments),
        **options,
    )


def trained_with(adapter: StoredAdapter, arguments: Arguments) -> dict[str, Any]:
    """Return the prompt and the side that are asked for, or else those of the training, where they are recorded."""
    recorded = adapter.beside(ARGUMENTS)
    prompt, side = recorded.get("instance_prompt") or recorded.get("validation_prompt"), recorded.get("resolution")
    own = {
        "prompt": prompt if prompt and isinstance(prompt, str) else None,  # bases without text have an empty one
        "resolution": side if isinstance(side, int) else None,
    }
    given = {name: getattr(arguments, name) for name in own}
    return own | {name: value for name, value in given.items() if value is not None}


def _evaluate_texts(
    adapter: StoredAdapter, arguments: Arguments, contexts: Sequence[Context] | None, **options: Any
) -> EvaluationReport:
    from ..data.from_arguments import load_text_data
    from ..evaluation.asked import check_concepts
    from ..evaluation.judges import load_judge
    from ..evaluation.text_evaluator import evaluate_texts

    judge = None if arguments.judge is None else load_judge(arguments.judge)  # first: a misspelled one is found now
    data = load_text_data(replace(arguments, text_column=arguments.text_column or "text"))
    check_concepts(adapter.config.concepts, data)
    if arguments.calibrate:
        check_rows(data)
    model, tokenizer = adapter.language_model(contexts or (), **arguments.weights)
    return evaluate_texts(
        model,
        tokenizer,
        data,
        contexts=contexts,
        prompt=arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        judge=judge,
        **_learned(adapter, data.content_column),
        **options,
    )


def _learned(adapter: StoredAdapter, content_column: str) -> dict[str, Any]:
    """What the training read and learned of rows, as far as it is recorded beside the adapter and rows have it."""
    recorded = adapter.beside(ARGUMENTS)
    length, completions = recorded.get("max_length"), recorded.get("completion_only_loss")
    return {
        "max_length": length if isinstance(length, int) else None,
        "completion_only": completions if isinstance(completions, bool) and content_column != "text" else None,
        "assistant_only": recorded.get("assistant_only_loss") is True and content_column == "messages",
    }
