"""`hf-causal-context info`: what an adapter holds, and whether it fits a base."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._files import CARD_CONTENTS, DATA_RECORD
from ..data.arguments import argument, refuse_useless
from .adapter_arguments import ADAPTER

if TYPE_CHECKING:
    from ..inference.adapted import StoredAdapter


@dataclass(kw_only=True)
class Arguments:
    """Settings of the command."""

    adapter: str = field(metadata={"help": ADAPTER})
    pretrained_model_name_or_path: str | None = argument(
        None, "A base to load: says whether the adapter fits it, and how much each concept changes its weights."
    )
    revision: str | None = argument(None, "Revision of that base on the Hub.")
    variant: str | None = argument(None, "Of that base's files, such as fp16.")
    adapter_revision: str | None = argument(None, "Branch, tag or commit of the adapter on the Hub.")
    json: bool = argument(False, "For programs.")


def run(arguments: Arguments) -> None:
    """Print it; see `describe` for what it raises."""
    found = describe(arguments)
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for name, value in found.items():
        shown = _text(value)
        if shown:
            print(f"{name.replace('_', ' ') + ':':<20} {shown}")


def describe(arguments: Arguments) -> dict[str, Any]:
    """Return what there is to say of an adapter, as JSON; null or empty is what is not known.

    Raises:
        ValueError, OSError: for something that holds no adapter or a damaged one, or a base that it does not fit.
    """
    from ..adapter.storage.files import read_header
    from ..inference.adapted import StoredAdapter

    stored = StoredAdapter.open(
        arguments.adapter,
        arguments.pretrained_model_name_or_path,
        revision=arguments.revision,
        adapter_revision=arguments.adapter_revision,
    )
    if arguments.pretrained_model_name_or_path is None:
        refuse_useless(arguments, ["revision", "variant"], "No base is given (--pretrained_model_name_or_path)")
    if stored.is_of_language_model:
        refuse_useless(arguments, ["variant"], f"{arguments.adapter} is an adapter of a language model")
    config = stored.config
    parts = stored.parts()
    tensors = [
        tensor
        for folder, part, source in parts.values()
        for tensor in read_header(folder, part.layout(), source).values()
    ]
    card, data = (stored.beside(name) for name in (CARD_CONTENTS, DATA_RECORD))
    given = card.get("descriptions")
    descriptions = given if isinstance(given, dict) else {}
    of_pipelines = "videos" if card.get("frame_rate") else "images"
    found: dict[str, Any] = {
        "adapter": stored.source,
        "concepts": {name: str(descriptions.get(name, "")) for name in config.concepts},
        "base": config.base_model_name_or_path,
        "makes": "texts" if stored.is_of_language_model else of_pipelines if config.task_type is None else None,
        "calibrated": [name for name, knots in config.knots().items() if knots],
        "mechanism": config.mechanism,
        "concept_rank": config.concept_rank,
        "observational_rank": config.observational_rank or 0,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "other_parts": sorted(filter(None, parts)),
        "trained_on": data.get("trained"),
        "held_out": data.get("held_out"),
        "reweighted": data.get("reweighted"),
        "self_composed": data.get("self_composed"),
        "license": card.get("license"),
    }
    if arguments.pretrained_model_name_or_path is not None:
        found["fits"] = arguments.pretrained_model_name_or_path
        found["relative_change"] = _changes(stored, arguments.variant)
    return found


def _changes(stored: StoredAdapter, variant: str | None) -> dict[str, float]:
    """How much each concept changes the weights of the base, which is loaded for it: a mean over layers."""
    from ..adapter.effects import causal_effects

    model = stored.language_model()[0] if stored.is_of_language_model else stored.pipeline(variant=variant).denoiser
    effects = causal_effects(model)
    return dict(zip(effects.concepts, effects.changes.mean(0).tolist(), strict=True))


def _text(value: Any) -> str:
    """A value on one line, whatever a stranger's files hold."""
    match value:
        case None:
            return ""
        case dict():
            return ", ".join(": ".join(filter(None, (_text(k) or "obs", _text(each)))) for k, each in value.items())
        case list():
            return ", ".join(map(_text, value))
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.3g}"
    return "".join(character if character.isprintable() else "?" for character in str(value))
