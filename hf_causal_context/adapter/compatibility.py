"""Refuses a stored adapter that was made for another model, before anything is attached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import CausalContextConfig
from .layer import adapted_class, geometry
from .registration import PREFIX
from .saving import PEFT_PREFIX

_SHOWN = 3  # differences that a message lists


def check_fits(model: nn.Module, config: CausalContextConfig, shapes: Mapping[str, Sequence[int]], source: str) -> None:
    """Compare what an adapter recorded with a model.

    Args:
        model: the one to attach it to.
        config: the adapter's.
        shapes: of its stored weights, by their names in the file.
        source: what to call the adapter in messages.

    Raises:
        ValueError: for another class of model, modules that the model lacks, or modules of other sizes.
    """
    trained_for = (config.auto_mapping or {}).get("base_model_class")
    base = f" (base {config.base_model_name_or_path!r})" if config.base_model_name_or_path else ""
    name = type(model).__name__
    if trained_for is not None and trained_for != name:
        raise ValueError(
            f"{source} was trained for a {trained_for}{base}, and this is a {name}. Load it into a "
            f"{trained_for}, or a pipeline with one."
        )
    differences = [text for key, shape in shapes.items() if (text := _difference(model, key, tuple(shape)))]
    if not any(PREFIX in key for key in shapes):
        differences = ["its file holds no weights of a causal context adapter"]
    if differences:
        more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise ValueError(
            f"{source} does not fit this {name}: {'; '.join(differences[:_SHOWN])}{more}. It was trained for another "
            f"base{base}: load it into that one."
        )


def _difference(model: nn.Module, key: str, shape: tuple[int, ...]) -> str | None:
    path, separator, rest = key.removeprefix(PEFT_PREFIX).partition(f".{PREFIX}")
    if not separator:
        return None  # of modules_to_save: their names and shapes are checked when they are loaded
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return f"it has weights for {path!r}, which is not there"
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if adapted_class(module) is None:
        return f"it has weights for {path!r}, which is a {type(module).__name__}"
    inputs, outputs, kernel = geometry(module)
    if rest == "down.weight" and shape[1:] != (inputs, *kernel):
        return f"{path!r} takes inputs of size {_size(shape[1:])} there, {_size((inputs, *kernel))} here"
    if rest == "up.weight" and shape[:1] != (outputs,):
        return f"{path!r} gives {shape[0]} features there, {outputs} here"
    return None


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
