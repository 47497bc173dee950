"""Injects the adapter into a base model, as PEFT's tuners do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from ..contexts import ContextBatch
from ..errors import UserValueError
from ..layers import StructuralLayer
from .announced_generate import AnnouncedGenerate, WholeBatches
from .batched_generate import BatchedGenerate, CheckedBatching
from .conditioning.in_force import in_force
from .config import CausalContextConfig
from .fusion import KeepsProjections
from .intervene import intervene
from .layer import CausalContextLayer, adapted_class
from .lookup import adapted_layers, place
from .names import check_adapter_name
from .peft_type import PREFIX
from .saving import SavedWithoutAdapters, SavesLoraOnly
from .storage.load_hook import check_all_have_a_place
from .targets import TargetModulesError, all_linear, check_targets, default_target_modules, describe_candidates
from .trained_tokens import check_token_indices, put_in_contexts

_METHODS = (
    SavedWithoutAdapters,
    SavesLoraOnly,
    AnnouncedGenerate,
    WholeBatches,
    BatchedGenerate,
    CheckedBatching,
    KeepsProjections,
)


class CausalContextModel(BaseTuner):
    """The tuner behind `get_peft_model(model, CausalContextConfig(...))`.

    Args:
        model: any torch model with Linear layers, GPT-2's Conv1D or convolutions.
        config: the adapter's configuration.
        adapter_name: its name.
        low_cpu_mem_usage: create the weights on the meta device, to be loaded.

    Raises:
        ValueError: when a part of `target_modules` matches no module, or one that cannot be adapted; for a name that
            `check_adapter_name` refuses.
    """

    prefix: str = PREFIX
    tuner_layer_cls = CausalContextLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(check_all_have_a_place)

    def generate(self, *args: Any, context: ContextBatch | None = None, **kwargs: Any) -> Any:
        """Return the base model's `generate`, under a context."""
        if context is None:
            return self.model.generate(*args, **kwargs)
        with intervene(self.model, context):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        # PEFT drops the argument after this.
        if adapter_names is not None:
            raise UserValueError(
                f"adapter_names={adapter_names} would choose an adapter for each row, which this method does not do. "
                "Give each row a context instead, context=[...] or intervene(model, [...]): rows may have concepts of "
                "several active adapters."
            )
        yield

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, CausalContextConfig)
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(self.model, model_config)
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the target modules and hook the base model; see `BaseTuner.inject_adapter`."""
        try:
            check_adapter_name(adapter_name, model)
        except UserValueError:
            self.peft_config.pop(adapter_name, None)  # PEFT noted it already, in a dictionary of the model itself
            raise
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except TargetModulesError:
            raise
        except NoMatchingPeftModuleError as error:
            raise TargetModulesError(f"{error} {describe_candidates(model)}") from None
        layer = next(_layers(model), None)
        if layer is not None:
            layer.conditioning.install(model, on_removal=_take_methods_off)
            put_in_contexts(model, adapter_name, layer.conditioning)
            for method in _METHODS:
                method.put_on(model)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, CausalContextConfig)
        # Before anything is wrapped: a module that matches but cannot be adapted must not leave a half-wrapped model.
        if str(peft_config.target_modules).lower() == "all-linear":
            peft_config.target_modules = all_linear(model, peft_config)
        adapted = []
        modules = dict(model.named_modules())
        wrapped = {key for key, module in modules.items() if isinstance(module, BaseTunerLayer)}
        for key, module in modules.items():
            inside = bool(wrapped) and any(parent in wrapped for parent in _parents(key))
            if not key or inside or not self._check_target_module_exists(peft_config, key):
                continue
            if adapted_class(module) is None:
                raise UserValueError(
                    f"Target module {key!r} of type {type(module).__name__} is not supported. Supported: Linear (not "
                    "inside nn.MultiheadAttention), Conv1D of GPT-2, Conv1d, Conv2d and Conv3d. Exclude it with "
                    f"exclude_modules. {describe_candidates(model)}"
                )
            adapted.append(key)
        check_targets(model, peft_config, adapted)
        check_token_indices(model, peft_config.trainable_token_indices)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, CausalContextConfig)
        # Next to the base, inside what others have put around it: their tensors keep the names that they know.
        while isinstance(target, BaseTunerLayer) and not isinstance(target, CausalContextLayer):
            parent, target, target_name = target, cast(nn.Module, target.base_layer), "base_layer"
        if isinstance(target, CausalContextLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer_cls = adapted_class(target)
        assert layer_cls is not None
        existing = next((layer.conditioning for layer in _layers(self.model)), None)
        layer = layer_cls(target, existing)
        layer.update_layer(adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        layer.train(target.training)  # else attaching to a model in eval mode would make it half a model in training
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # whose adapter is where its base is; PEFT would move it again

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return the name of a tensor in a file, which knows nothing of other adapters (PEFT inverts it to load)."""
        path, prefix, rest = super()._remove_adapter_name_from_key(key, adapter_name).rpartition(f".{PREFIX}")
        return place(path) + prefix + rest

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layer = next(_layers(self.model), None)
        if merge:
            self._check_tied_weights()
        with self._context_to_merge(layer) if merge else nullcontext():
            # Those inside a LoRA: PEFT takes the outermost off, and with it all that is inside.
            for path, inner in list(self.model.named_modules()):
                if isinstance(inner, CausalContextLayer) and path.endswith(".base_layer"):
                    if merge:
                        inner.merge(safe_merge, adapter_names)
                    self.model.set_submodule(path, inner.base_layer)
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if layer is not None:
            layer.conditioning.remove(self.model)
        return model

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_tied_weights()
        with self._context_to_merge(next(_layers(self.model), None)):
            super().merge_adapter(adapter_names, safe_merge)

    def _context_to_merge(self, layer: CausalContextLayer | None) -> AbstractContextManager[object]:
        """Put the observational context in force where none is set."""
        if layer is None or layer.training or layer.conditioning.request() is not None:
            return nullcontext()
        warnings.warn(
            "Merging without a context merges the observational one: the world of the data, with nothing "
            "intervened on. Merge inside `with intervene(model, context):` for another.",
            stacklevel=3,
        )
        active = layer.conditioning.active_adapters()
        return in_force([layer.conditioning.make_request(())] if active else [])

    def _check_tied_weights(self) -> None:
        owners = {id(inner.get_base_layer().weight): name for name, inner in adapted_layers(self.model).items()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            adapted = owners.get(id(parameter))
            if adapted is not None and not name.startswith(f"{adapted}."):
                raise UserValueError(
                    f"The weight of {adapted!r} is tied: it is {name!r} as well, which a merge would change, too. Keep "
                    "the adapter, or a baked LoRA; or untie the base before the adapter is attached, by a copy: "
                    f"model.{adapted}.weight = nn.Parameter(model.{adapted}.weight.detach().clone()), and "
                    "model.config.tie_word_embeddings = False."
                )


def _take_methods_off(model: nn.Module) -> None:
    for method in _METHODS:
        method.take_off(model)


def acyclicity_penalty(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """Sum over layers of the penalty on cycles among learned direct effects; add it to the loss (scalar, >= 0).

    Raises:
        ValueError: for an adapter without the mechanism "structural".
    """
    penalties = [
        causal.acyclicity_penalty()
        for layer in _layers(model)
        if adapter_name in layer.causal_context_causal
        and isinstance(causal := layer.causal(adapter_name), StructuralLayer)
    ]
    if not penalties:
        raise UserValueError(
            f"Adapter {adapter_name!r} has no layer with mechanism='structural', so there are no cycles."
        )
    return torch.stack(penalties).sum()


def _layers(model: nn.Module) -> Iterator[CausalContextLayer]:
    return (module for module in model.modules() if isinstance(module, CausalContextLayer))


def _parents(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key
