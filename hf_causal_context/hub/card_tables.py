"""The tables on a card: data, settings, evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._markdown import table

_SETTINGS = {
    "mechanism": "mechanism",
    "concept_rank": "rank of each concept",
    "observational_rank": "rank of the observational part",
    "max_train_steps": "steps",
    "train_batch_size": "batch",
    "gradient_accumulation_steps": "batches per step",
    "learning_rate": "learning rate",
    "train_text_encoder": "text encoders are adapted, too",
    "text_encoder_rank": "rank of each concept in text encoders",
    "text_encoder_learning_rate": "learning rate of text encoders",
    "lr_scheduler": "schedule",
    "use_ema": "moving average of the weights",
    "mixed_precision": "precision",
    "quantization": "quantization of the base",
    "gguf_file": "GGUF file of the base's weights",
    "optimizer": "optimizer",
    "resolution": "resolution",
    "context_weights": "weights of contexts",
    "seed": "seed",
}
# Characters that mean something inside a line of Markdown, and "|" in its tables.
_MARKUP = re.compile(r"([\\`*_\[\]#|~$])")


def markdown_text(text: str) -> str:
    """Text that stands for itself in Markdown and HTML, whatever it holds."""
    plain = " ".join(text.split())
    return _MARKUP.sub(r"\\\1", plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def data_table(data: Mapping[str, Any]) -> str:
    """Return the contexts of training_data.json, their rows, and what they were for."""
    if not data:
        return ""
    contexts: dict[str, list[str]] = {}
    for context, count in data.get("trained", {}).items():
        contexts.setdefault(context, []).append(f"{_rows(count)}, trained on")
    for context, count in data.get("held_out", {}).items():
        contexts.setdefault(context, []).append(f"{_rows(count)}, only measured")
    for context, count in data.get("reweighted", {}).items():
        contexts.setdefault(context, []).append(f"{count:,} draws from rows of single interventions, trained on")
    for context, count in data.get("self_composed", {}).items():
        own = (
            f"{count:,} texts that the adapter wrote itself, trained on" if count else "no texts of its own at the end"
        )
        contexts.setdefault(context, []).append(own)
    rows = [(_label(context), "; ".join(uses)) for context, uses in contexts.items()]
    return "\n".join(["The data:", "", *table(("context", "rows"), rows)])


def settings_table(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the settings of training_arguments.json that decide most, and the adapted modules of the config."""
    if not arguments:
        return ""
    rows = [
        (name, markdown_text(", ".join(value) if isinstance(value, list) else _public(str(value))))
        for key, name in _SETTINGS.items()
        if (value := arguments.get(key)) not in (None, False, "", [])
    ]
    targets = config.get("target_modules")
    if targets:
        listed = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        rows.append(("adapted modules", markdown_text(listed)))
    if not rows:
        return ""
    intro = "The settings (all of them are in [training_arguments.json](training_arguments.json)):"
    return "\n".join([intro, "", *table(("setting", "value"), rows)])


def evaluation_table(report: Mapping[str, Any]) -> str:
    """Verdict, distances (of texts perplexities) and conformity of a report.json; of an older one what it holds."""
    items = report["contexts"]
    texts = any(item.get("perplexity") for item in items)
    beside_base = any(item.get("base_conformity") is not None for item in items)
    rows = []
    for item in items:
        cells = _perplexity_cells(item["perplexity"]) if texts else _distance_cells(item["distance"])
        conformity, real = item["conformity"], _number(item["real_conformity"], 2)
        cells.append(f"{_number(conformity['mean'], 2)} / {real}" if conformity else "")
        if beside_base:
            beyond = [_number(item[f"{whose}conformity_beyond_base"], 2) for whose in ("", "real_")]
            cells += [_number(item["base_conformity"], 2), " / ".join(beyond)] if conformity else ["", ""]
        rows.append((_label(item["context"]), "yes" if item["trained"] else "none", *cells))
    columns = ["base", "empty context", "this adapter"] if texts else _DISTANCE_COLUMNS
    header = ["context", "data", *columns, "conformity / real"]
    header += ["the base's", "beyond it / real"] if beside_base else []
    measure = _PERPLEXITY if texts else _DISTANCE
    of_base = " *The base's* is that of the base without this adapter; *beyond it*, 0 is what the base does by itself."
    sentences = [f"- {markdown_text(sentence)}" for sentence in report.get("verdict", {}).get("sentences", ())]
    return "\n".join(
        [
            *sentences,
            *([""] if sentences else []),
            f"{measure}, and *conformity*, the share of samples in which classifiers find every requested concept."
            f"{of_base if beside_base else ''}",
            "",
            *table(header, rows),
            *(f"\n{markdown_text(note)}" for note in report["notes"]),
        ]
    )


_DISTANCE = (
    "Sliced Wasserstein distance to real rows (lower is better; *gap closed* is 1 where samples are as near as real "
    "rows, 0 at the base)"
)
_DISTANCE_COLUMNS = ["base", "this adapter", "real against real", "gap closed"]
_PERPLEXITY = "Perplexity of real rows (lower is likelier; those of contexts with data are training rows)"


def _distance_cells(distance: Mapping[str, Any] | None) -> list[str]:
    if not distance:
        return ["", "", "", ""]
    cells = [_estimate(distance[name]) for name in ("base", "samples", "floor")]
    return [*cells, _number(distance["gap_closed"], 2)]


def _perplexity_cells(scores: Mapping[str, float | None] | None) -> list[str]:
    return [_number(scores[name], 2) if scores else "" for name in ("base", "empty", "adapter")]


def evaluation_results(report: Mapping[str, Any], dataset: object) -> Iterator[dict[str, Any]]:
    """The summaries of a report.json as fields of huggingface_hub's `EvalResult`."""
    for key, which in (("trained", "single concepts"), ("unseen", "unseen combinations")):
        summary = report.get(key)
        metrics = {
            "sliced_wasserstein": (f"Sliced Wasserstein distance, {which}", "samples"),
            "conformity": (f"Conformity, {which}", "conformity"),
            "conformity_beyond_base": (f"Conformity beyond the base's own, {which}", "conformity_beyond_base"),
        }
        for metric, (name, column) in metrics.items():
            if summary and summary.get(column) is not None:
                yield {
                    "dataset_type": str(dataset or "interventional"),
                    "dataset_name": str(dataset or "interventional data"),
                    "metric_type": metric,
                    "metric_name": name,
                    "metric_value": round(summary[column], 4),
                }


def _public(value: str) -> str:
    """Return a setting without the folders of a machine."""
    return Path(value).name if Path(value).is_absolute() else value


def _rows(count: int | None) -> str:
    return "a stream" if count is None else f"{count:,}"


def _label(context: str) -> str:
    return markdown_text(context) or "(observational)"


def _estimate(value: Mapping[str, float | None]) -> str:
    width = value["half_width"]
    return _number(value["mean"], 4) + ("" if width is None else f" ± {width:.4f}")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
