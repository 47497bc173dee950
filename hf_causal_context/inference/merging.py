"""The base of an adapter with one context in its weights: what `hf-causal-context merge` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from .._files import complete_or_absent
from ..adapter.baking import check_linear
from ..adapter.intervene import intervene
from ..adapter.lookup import adapted_layers, conditionings
from ..adapter.trained_tokens import ContextTokens
from ..bases.diffusion_base import DiffusionBase
from ..contexts import Context
from .adapted import StoredAdapter
from .pipelines import unwrap


def write_merged(
    stored: StoredAdapter, context: Context, output_dir: Path, *, variant: str | None = None, **weights: Any
) -> None:
    """Write the base of an adapter with a context in its weights, as a folder that needs neither PEFT nor this package.

    It appears complete or not at all. `weights` say how the base is held; see `StoredAdapter`.

    Raises:
        FileExistsError: for a folder that is not empty.
        ValueError, OSError: for what `StoredAdapter` refuses, and a mechanism or weights that cannot be merged.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} exists and is not empty. Choose another --output_dir, or remove it.")
    check_linear(stored.config)
    if stored.is_of_language_model:
        model, tokenizer = stored.language_model([context], **weights)
        with intervene(model, context):
            merged: Any = model.merge_and_unload(safe_merge=True)
        saved = (merged, tokenizer)
    else:
        base = stored.pipeline([context], variant=variant, **weights)
        merge(base, context)
        saved = (base.pipe,)
    with complete_or_absent(output_dir) as unfinished:
        for part in saved:
            part.save_pretrained(unfinished)


def merge(base: DiffusionBase, context: Context) -> None:
    """Put the adapter "default" in a context into the weights of a pipeline for good, in place."""
    modules = [part for part in base.pipe.components.values() if isinstance(part, nn.Module) and conditionings(part)]
    with intervene(base.pipe, context):
        for module in modules:
            tokens = [inner for inner in module.modules() if isinstance(inner, ContextTokens)]
            for layer in [*adapted_layers(module).values(), *tokens]:
                layer.merge(safe_merge=True)
    for module in modules:
        del cast(Any, module).peft_config["default"]
        unwrap(module, conditionings(module), keep="default")
