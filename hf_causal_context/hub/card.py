"""The card of an adapter, which the Hub shows as its page: made of the files in the adapter's folder.

`render_card` depends on these files only, so a card can be made again, for another name, without the adapter's base.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import EvalResult

from .._files import ARGUMENTS, CARD, CONFIG, DATA_RECORD, REPORT, RESULTS, RESULTS_IMAGE, complete_or_absent, read_json
from .._markdown import table
from ..adapter.plain_card import is_replaceable
from ..bases.gap import BaseGap
from ..bases.names import is_folder, is_packaged
from ..contexts import Context
from ..messages.installation import installation
from .card_code import python_literal, usage_code
from .card_tables import data_table, evaluation_results, evaluation_table, markdown_text, settings_table
from .contents import STRENGTHS, CardContents

_TEMPLATE = str(files("hf_causal_context.hub") / "card.md.jinja")
_SEAL = "<!-- Written by hf_causal_context, which replaces this text only while it is as it was written: {} -->"
_MOST_WIDGETS = 12
_OBSERVATIONAL_NOTE = """
The adapter also has an *observational part*: what its data look like beside what the base makes. It is on in every
context, the empty one included, at the strength `observational`: `1`, the default, is the look of the data, `0` that of
the base, as in `intervene(..., observational=0)` or in the context `"observational=0,..."`. Without any context the
model is the base, bit for bit.
"""
_STRENGTHS_NOTE = f"Columns: strength {', '.join(f'{strength:g}' for strength in STRENGTHS)}, from the same seed."


def write_card(folder: Path) -> None:
    """Write README.md from the other files of an adapter's folder, unless it was edited.

    Raises:
        OSError: for files that are not there or cannot be written.
    """
    path = folder / CARD
    if path.exists() and is_edited(text := path.read_text(encoding="utf-8")) and not is_replaceable(text):
        return
    with complete_or_absent(path) as unfinished:
        unfinished.write_text(render_card(folder), encoding="utf-8", newline="\n")


def render_card(folder: Path, repo_id: str | None = None, branch: str | None = None) -> str:
    """Return the card as text.

    Args:
        folder: an adapter's, with card.json; its training_arguments.json, training_data.json, base_gap.json,
            evaluation/report.json, results.md and results.png (what else was measured) are used where they are there.
        repo_id: what the code on the card loads; by default the name in card.json.
        branch: of the repository that it loads.
    """
    contents = CardContents.load(folder)
    stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    concepts = tuple(stored["concepts"])
    arguments, data, report = (read_json(folder / name) for name in (ARGUMENTS, DATA_RECORD, REPORT))
    name = repo_id or contents.name
    title = name.rpartition("/")[2]
    local = is_folder(contents.base) or is_packaged(contents.base)
    fields: dict[str, Any] = {
        "title": markdown_text(title),
        "base": _base(contents.base),
        "num_concepts": f"{len(concepts)} concept{'s' if len(concepts) > 1 else ''}",
        "base_gap": _base_gap(folder, stored),
        "grid": _image(contents.grid, "Samples in each context", _grid_note(contents, data)),
        "concepts": _concepts(concepts, contents),
        "installation": installation("diffusers" if contents.library == "diffusers" else ""),
        "usage": usage_code(contents, name, branch, example_context(contents, concepts)),
        "usage_note": _usage_note(contents, concepts),
        "strengths": "\n" + _image(contents.strengths, "Each concept at growing strength", _STRENGTHS_NOTE),
        "trained_strengths": _trained_strengths(data, stored),
        "observational": _OBSERVATIONAL_NOTE if stored.get("observational_rank") else "",
        "loras": _loras(contents, name),
        "data": data_table(data),
        "settings": settings_table(arguments, stored),
        "evaluation": _evaluation(folder, report),
        "influence": _influence(contents),
        "license": _license(contents, local),
    }
    card = ModelCard.from_template(_metadata(contents, arguments, report, title, local), _TEMPLATE, **fields)
    text = re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"
    return f"{text}\n{_SEAL.format(_digest(text))}\n"


def _trained_strengths(data: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    named = [strength for context in data.get("trained", {}) for strength in Context.parse(context).strengths.values()]
    trained = {0.0, *(named or [1.0])}
    *others, last = (f"{strength:g}" for strength in sorted(trained))
    text = f"{'Only ' if len(trained) == 2 else ''}{', '.join(others)} and {last} were trained."
    if calibrated := stored.get("calibration"):
        names = ", ".join(map(markdown_text, calibrated))
        text += f" With `calibrated=True` (`--calibrated`), equal steps of the strength of {names} are equal changes."
    return text


def is_edited(text: str) -> bool:
    """Whether a card is something else than what `render_card` wrote."""
    body, separator, seal = text.replace("\r\n", "\n").rpartition("\n" + _SEAL.partition("{}")[0])
    return not separator or seal.strip() != f"{_digest(body)} -->"


def example_context(contents: CardContents, concepts: tuple[str, ...]) -> str:
    """Return the context of the card's code: the first combination that it shows, else the first single context.

    Without samples it is the first two concepts.
    """
    if not contents.samples:
        return "+".join(concepts[:2])
    return next((context for context in contents.samples if "+" in context), next(filter(None, contents.samples), ""))


def _metadata(
    contents: CardContents, arguments: Mapping[str, Any], report: Mapping[str, Any], title: str, local: bool
) -> ModelCardData:
    dataset = arguments.get("dataset_name")
    on_hub = isinstance(dataset, str) and dataset.count("/") == 1 and not is_folder(dataset)
    results = [EvalResult(task_type=contents.pipeline_tag, **item) for item in evaluation_results(report, dataset)]
    widgets = [
        {
            "text": context or "no intervention",
            "output": {"url": path} if contents.library == "diffusers" else {"text": path},
        }
        for context, path in contents.samples.items()
    ]
    return ModelCardData(
        library_name="peft",
        base_model=None if local else contents.base,
        base_model_relation=None if local else "adapter",
        pipeline_tag=contents.pipeline_tag,
        license=contents.license,
        datasets=dataset if on_hub else None,
        tags=["causal-context", "hf_causal_context", contents.library],
        widget=widgets[:_MOST_WIDGETS] or None,
        eval_results=results or None,
        model_name=title if results else None,
    )


def _base(base: str) -> str:
    if is_packaged(base):
        return f"`{Path(base).name}`, a small model that comes with the package"
    return f"`{Path(base).name if is_folder(base) else base}`"


def _base_gap(folder: Path, config: Mapping[str, Any]) -> str:
    gap = BaseGap.load(folder)
    # A config that does not say is of an adapter without an observational part.
    return f"{gap.note(config.get('observational_rank') or 0)}\n\n" if gap is not None else ""


def _concepts(concepts: tuple[str, ...], contents: CardContents) -> str:
    """Return what each concept means and does to one sample, and what combinations do."""
    described = [f"- {markdown_text(name)}: {markdown_text(text)}" for name, text in contents.descriptions.items()]
    if not contents.samples:
        return "\n".join(described) or "The concepts: " + ", ".join(markdown_text(name) for name in concepts) + "."
    rows = [(markdown_text(context) or "no intervention", _sample(context, contents)) for context in contents.samples]
    lines = list(table(("context", "sample, from the same seed"), rows))
    prompt = ["", f"The prompt: {markdown_text(contents.prompt)}"] if contents.prompt else []
    return "\n".join([*described, "", *lines, *prompt] if described else [*lines, *prompt])


def _sample(context: str, contents: CardContents) -> str:
    """One cell of a table."""
    sample = contents.samples[context]
    if contents.library == "transformers":
        return markdown_text(sample)
    return f'<img src="{_url(sample)}" alt="{html.escape(context or "no intervention")}" width="128">'


def _grid_note(contents: CardContents, data: Mapping[str, Any]) -> str:
    unseen = [c for c in contents.samples if "+" in c and c not in data.get("trained", {})]
    note = "Every row is a context, every column a seed."
    if not unseen or not data:
        return note
    drawn = [c for c in unseen if c in data.get("reweighted", {})]
    how = " For some, rows of single interventions stood in." if drawn else ""
    how = " Rows of single interventions stood in for them." if drawn == unseen else how
    return f"{note} Not trained on: {', '.join(markdown_text(c) for c in unseen)}.{how}"


def _usage_note(contents: CardContents, concepts: tuple[str, ...]) -> str:
    forms = f'text such as "{markdown_text(concepts[0])}=0.5", names, or a mapping of names to strengths'
    contexts = f"A context is {forms}; a list gives each sample its own."
    if not contents.samples:
        return contexts
    shown = contents.samples[example_context(contents, concepts)]
    made = f"image `{shown}`" if contents.library == "diffusers" else "text"
    if contents.frame_rate is not None:
        made = f"video behind `{shown}`"
    return (
        f"This makes the {made} of this card again, to the last bit on the same kind of device with the same versions "
        f"of the libraries; another context makes the others. {contexts}"
    )


def _loras(contents: CardContents, name: str) -> str:
    if contents.without_loras:
        return f"### Plain LoRAs\n\nNone: {markdown_text(contents.without_loras)}\n\n"
    if not contents.loras:
        return ""
    first = Path(next(iter(contents.loras.values())))
    repo = python_literal(name)
    if contents.lora_format == "diffusers":
        call = f'pipe.load_lora_weights({repo}, weight_name="{first.name}", subfolder="{first.parent.as_posix()}"'
        call += ", load_into_transformer_2=True)" if contents.denoiser == "transformer_2" else ")"
    else:
        model = f"pipe.{contents.denoiser}" if contents.denoiser else "model"
        call = f'PeftModel.from_pretrained({model}, {repo}, subfolder="{first.as_posix()}")'
    listed = ", ".join(f"[{markdown_text(context)}]({_url(path)})" for context, path in contents.loras.items())
    return (
        "### Plain LoRAs\n\nContexts baked at strength 1, for a stock base and tools that know LoRA only, without this "
        f"package (`{call}`):\n{listed}.\n\n"
    )


def _evaluation(folder: Path, report: Mapping[str, Any]) -> str:
    parts = []
    if report:
        parts.append(evaluation_table(report))
        if (folder / "evaluation" / "report.png").exists():
            parts.append(_image("evaluation/report.png", "The evaluation report", "").strip())
        parts.append("All of it: [evaluation/report.md](evaluation/report.md).")
    if (folder / RESULTS_IMAGE).exists():
        parts.append(_image(RESULTS_IMAGE, "What was measured", "").strip())
    if (folder / RESULTS).exists():
        parts.append((folder / RESULTS).read_text(encoding="utf-8").strip("\n"))
    return "## Evaluation\n\n" + "\n\n".join(parts) + "\n\n" if parts else ""


def _influence(contents: CardContents) -> str:
    if contents.influence is None:
        return ""
    note = "How strongly concepts act, read from the weights. It is a map of learned influence, not a causal graph."
    return "## Read-out\n\n" + _image(contents.influence, "Learned influence of the concepts", note)


def _license(contents: CardContents, local: bool) -> str:
    own = f"The adapter: {contents.license}." if contents.license else "The author has not stated a license."
    return own + ("" if local else f" The license and terms of `{contents.base}` apply to its use.")


def _image(path: str | None, alt: str, note: str) -> str:
    if path is None:
        return ""
    return f"![{alt}]({_url(path)})\n\n" + (f"*{note}*\n\n" if note else "")


def _url(path: str) -> str:
    return quote(path, safe="/+=.-_")


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip("\n").encode()).hexdigest()[:16]
