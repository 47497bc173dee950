"""Refuses a stored adapter that was made for another model, before anything is attached or allocated."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import CausalContextConfig
from .layer import adapted_class, geometry, unwrapped
from .peft_type import PREFIX
from .storage.layout import AdapterError, StoredTensor, not_whole
from .targets import default_target_modules
from .trained_tokens import token_weights

_SHOWN = 3  # differences that a message lists


def check_fits(model: nn.Module, config: CausalContextConfig, tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Compare an adapter, whose weights and config agree, with the model to attach it to.

    Args:
        model: the base, which may carry other adapters.
        config: the adapter's.
        tensors: what its file holds, by names in the base model; see `read_header`.
        source: what to call the adapter in messages.

    Raises:
        AdapterError: for another class of model, modules that the model lacks or of other sizes, and for weights
            that the config does not ask for on this model, or that are missing.
    """
    trained_for = (config.auto_mapping or {}).get("base_model_class")
    base = f" (base {config.base_model_name_or_path!r})" if config.base_model_name_or_path else ""
    name = type(model).__name__
    if trained_for is not None and trained_for != name:
        raise AdapterError(
            f"{source} was trained for a {trained_for}{base}, and this is a {name}. Load it into a "
            f"{trained_for}, or a pipeline with one."
        )
    modules = dict(model.named_modules())
    found = (_difference(modules, key, tensor.shape) for key, tensor in tensors.items())
    differences = [text for text in dict.fromkeys(found) if text]  # a module has several tensors
    try:
        expected = _expected(model, config)
    except ValueError as error:  # from PEFT, or no defaults for a config without target_modules
        raise AdapterError(f"{source} does not say which modules of this {name} it adapts. {error}") from error
    if not differences:
        differences = [text for key, tensor in tensors.items() if (text := _unasked(key, tensor, expected))]
    if differences:
        more = f", and {len(differences) - _SHOWN:,} more" if len(differences) > _SHOWN else ""
        raise AdapterError(
            f"{source} does not fit this {name}: {'; '.join(differences[:_SHOWN])}{more}. It was trained for another "
            f"base{base}: load it into that one."
        )
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise not_whole(source, missing)


def _difference(modules: Mapping[str, nn.Module], key: str, shape: tuple[int, ...]) -> str | None:
    path, separator, rest = key.rpartition(f".{PREFIX}")
    if not separator:
        return None  # of modules_to_save, or of trained tokens
    module = modules.get(path)
    if module is None:
        return f"it has weights for {path!r}, which is not there"
    module = unwrapped(module)
    if adapted_class(module) is None:
        return f"it has weights for {path!r}, which is a {type(module).__name__}"
    inputs, outputs, kernel = geometry(module)
    if rest == "down.weight" and shape[1:] != (inputs, *kernel):
        return f"{path!r} takes inputs of size {_size(shape[1:])} there, {_size((inputs, *kernel))} here"
    if rest == "up.weight" and shape[:1] != (outputs,):
        return f"{path!r} gives {shape[0]} features there, {outputs} here"
    return None


def _unasked(key: str, tensor: StoredTensor, expected: Mapping[str, StoredTensor]) -> str | None:
    if key not in expected:
        return f"it has a tensor {key!r}, which its config does not ask for"
    if tensor != expected[key]:
        return f"its tensor {key!r} of shape {tensor.shape} should have the shape {expected[key].shape}"
    return None


def _expected(model: nn.Module, config: CausalContextConfig) -> dict[str, StoredTensor]:
    """Return what the file of an adapter with this config holds, if it was made for this model."""
    expected: dict[str, StoredTensor] = {}
    layout = config.layout()
    for path, module in _targets(model, config):
        inputs, outputs, kernel = geometry(module)
        shapes = layout.shapes(config.rank_at(path), (inputs, *kernel), outputs)
        expected |= {f"{path}.{PREFIX}{weight}": StoredTensor(shape, True) for weight, shape in shapes.items()}
    for key, shape in token_weights(model, config.trainable_token_indices).items():
        expected[key] = StoredTensor(shape, True)
    for path, module in _kept_whole(model, config.modules_to_save or ()):
        for name, tensor in module.state_dict().items():
            expected[f"{path}.{name}"] = StoredTensor(tuple(tensor.shape), tensor.is_floating_point())
    return expected


def _targets(model: nn.Module, config: CausalContextConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules that PEFT would adapt, as they are without adapters."""
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = default_target_modules(model, BaseTuner.get_model_config(model))
    _maybe_include_all_linear_layers(config, model)
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        if adapted:
            inside += (f"{path}.",)
        if check_target_module_exists(config, path) and adapted_class(module) is not None:  # PEFT refuses others
            yield path, module.get_base_layer() if adapted else module


def _kept_whole(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if names and not path.startswith(inside) and path.endswith(tuple(names)):
            if isinstance(module, AuxiliaryTrainingWrapper):
                inside += (f"{path}.",)
                module = module.original_module
            assert isinstance(module, nn.Module)
            yield path, module


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
