"""Adapters in stock diffusers pipelines: load them from a folder or the Hub, and take them off again.

An adapter is a folder or repository with the denoiser's adapter at the top; those of other components (text encoders)
lie in sub-folders with the components' names. So does every adapter of a saved pipeline.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from .._files import CONFIG, WEIGHTS, checkpoint_steps
from ..adapter.compatibility import check_fits
from ..adapter.conditioning.hooks import Conditioning
from ..adapter.config import CausalContextConfig
from ..adapter.followed_pipeline import follow, unfollow
from ..adapter.layer import CausalContextLayer
from ..adapter.lookup import adapted_layers, conditionings
from ..adapter.names import check_adapter_name
from ..adapter.storage.download import download
from ..adapter.storage.files import read_header, read_weights
from ..adapter.storage.layout import AdapterError, not_whole
from ..bases.names import DENOISERS
from ..errors import UserTypeError, UserValueError
from ..messages.wording import quoted
from .hotswap import check_swap, swap

if TYPE_CHECKING:
    from ..adapter.followed_pipeline import AnyPipeline

Pipeline = TypeVar("Pipeline", bound="AnyPipeline")

_COMPONENTS = (
    *DENOISERS,
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4", "image_encoder", "vae", "prior", "decoder"),
)


def load_context_adapter(
    pipe: Pipeline,
    repo_or_folder: str | Path,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    hotswap: bool = False,
) -> Pipeline:
    """Attach an adapter to a pipeline, in place, and return the pipeline.

    Contexts are set by `intervene(pipe, ...)`, or by ``cross_attention_kwargs={"context": ...}`` (or
    `joint_attention_kwargs`, `attention_kwargs`) where the pipeline has such an argument: one for all prompts, or a
    list with one per prompt or per image. Without a context the pipeline does what it did. Weights take the dtype and
    device of the pipeline's. Several adapters can be loaded under names of their own, and all are active.

    Args:
        pipe: a diffusers pipeline, stock or modular.
        repo_or_folder: a folder, or the id of a repository on the Hub.
        adapter_name: what to call it.
        revision: of the repository.
        token: for private repositories, as in huggingface_hub.
        hotswap: put it in the place of the loaded adapter of that name, which must have the same configuration. A
            compiled pipeline is not compiled anew.

    Raises:
        OSError: for something that holds no adapter, or cannot be reached.
        AdapterError: for another kind of adapter, one that was trained for another model, or damaged files.
        ValueError: for a name that is taken or that weights cannot have, a pipeline with sequential or group
            offloading (load the adapter first), an adapter that must be loaded before another one, or a hot swap with
            an adapter of another configuration.

    Example:
        >>> pipe = load_context_adapter(pipe, "user/digits-context")   # doctest: +SKIP
        >>> with intervene(pipe, "thickness+slant"):                   # doctest: +SKIP
        ...     pipe()
    """
    modules = _modules(pipe)
    check_adapter_name(adapter_name)
    components = dict.fromkeys([*modules, *_COMPONENTS])  # parts for components that are missing are told of
    places = adapter_places(components, adapter_name)
    folder = download(repo_or_folder, revision=revision, token=token, places=places)
    return attach(pipe, folder, str(repo_or_folder), adapter_name, hotswap)


def adapter_places(components: Iterable[str] = _COMPONENTS, adapter_name: str = "default") -> list[str]:
    """Where in a folder the adapters of a pipeline may lie; without arguments, of any pipeline of diffusers."""
    return ["", *(f"{name}/" for name in components), *(f"{name}/{adapter_name}/" for name in components)]


def part_files() -> list[str]:
    """Return where a folder holds the parts of an adapter that are not at its top, in files that may be there."""
    return [place + file for place in adapter_places() if place for file in (CONFIG, WEIGHTS)]


def remove_other_parts(folder: Path, written: Collection[str]) -> None:
    """Remove the parts of an adapter that a folder held before, of other components than those that were written.

    Whoever loads the folder would get them, too.
    """
    for file in map(Path, part_files()):
        if file.parts[0] not in written:
            (folder / file).unlink(missing_ok=True)


def attach(pipe: Pipeline, folder: Path, source: str, adapter_name: str = "default", hotswap: bool = False) -> Pipeline:
    """Attach the adapter in a folder to a pipeline, as `load_context_adapter`; messages call it `source`."""
    modules = _modules(pipe)
    found = _find(folder, modules, adapter_name)
    if not found:
        raise FileNotFoundError(
            f"{source} holds no adapter: there is no {CONFIG} in it, or in a sub-folder with the name of a "
            f"component of the pipeline ({quoted(modules)}).{_what_else(folder, modules, adapter_name)}"
        )
    others = {path.name for path in folder.iterdir()}.intersection(_COMPONENTS).difference(modules)
    if lacking := [name for name in sorted(others) if _find(folder, (name,), adapter_name).keys() - {None}]:
        warnings.warn(
            f"{source} also has an adapter of {quoted(lacking)}, and {type(pipe).__name__} has no such component, so "
            "that part does nothing. Load the pipeline with it, unless you pass prompt embeddings.",
            stacklevel=3,
        )
    chosen: dict[str, tuple[CausalContextConfig, dict[str, Tensor]]] = {}
    for name, path in found.items():
        part = source if name is None else f"{source} ({path.relative_to(folder)})"
        config = CausalContextConfig.read(path, part)
        component = name or _component_for(pipe, modules, config, part)
        if component in chosen:
            raise AdapterError(
                f"{source} has two adapters of pipe.{component}: one at the top, and one in "
                f"{path.relative_to(folder)}. Remove the one that is not meant, or move it to a folder of its own."
            )
        if not hotswap:
            _check_name(modules[component], component, adapter_name)
            _check_order(modules[component], component, config, part)
        _check_weights_are_here(modules[component], component)
        check_fits(modules[component], config, read_header(path, config.layout(), part), part)
        chosen[component] = config, read_weights(path, part)
    if len({config.concepts for config, _ in chosen.values()}) > 1:
        listed = "; ".join(f"{name}: {quoted(config.concepts)}" for name, (config, _) in chosen.items())
        raise AdapterError(f"The parts of {source} have different concepts ({listed}), so they are not one adapter.")
    if hotswap:
        loaded = context_adapters(pipe).get(adapter_name, {})
        check_swap(loaded, chosen, adapter_name, source)
        swap(loaded, chosen, adapter_name)
        return pipe
    attached = []
    try:
        for component, (config, weights) in chosen.items():
            attached.append(modules[component])
            _attach(modules[component], config, weights, adapter_name, source)
            if others := [name for name in chosen if name != component]:
                for owner in conditionings(modules[component]):
                    owner.elsewhere[adapter_name] = others
    except BaseException:
        for module in attached:
            _detach(module, adapter_name)
        raise
    follow(pipe)
    return pipe


def unload_context_adapter(pipe: AnyPipeline, adapter_name: str | None = None) -> None:
    """Take one causal context adapter off a pipeline, or all: it is then what it was before.

    Raises:
        ValueError: without such an adapter, while it is merged into the weights, or while a context is set for the last
            one of a component.
    """
    adapters = context_adapters(pipe)
    if not adapters or (adapter_name is not None and adapter_name not in adapters):
        raise UserValueError(
            f"{type(pipe).__name__} has no causal context adapter"
            + (f" {adapter_name!r}. It has: {quoted(sorted(adapters))}." if adapter_name else ".")
        )
    leaving = adapters if adapter_name is None else {adapter_name: adapters[adapter_name]}
    owners = {component: module for parts in leaving.values() for component, module in parts.items()}
    hooks = [each for module in owners.values() for each in conditionings(module)]
    if any(each.open_requests and each.concepts.keys() <= leaving.keys() for each in hooks):
        raise UserValueError(
            "The adapter cannot be unloaded while a `with intervene(...)` block is open for it, here or in another "
            "thread: its context would change nothing any more. End the block first."
        )
    for component, module in owners.items():
        for layer in adapted_layers(module).values():
            if leaving.keys() & set(layer.merged_adapters):
                owner, parts = (
                    ("pipe", f"[{component!r}]") if hasattr(pipe, "unfuse_lora") else (f"pipe.{component}", "")
                )
                raise UserValueError(
                    f"Adapters {layer.merged_adapters} are merged into the weights of pipe.{component}. Call "
                    f"{owner}.unfuse_lora({parts}) first."
                )
    for name, parts in leaving.items():
        for module in parts.values():
            _detach(module, name)
    if len(leaving) == len(adapters):
        unfollow(pipe)


def context_adapters(pipe: AnyPipeline) -> dict[str, dict[str, nn.Module]]:
    """Name of each causal context adapter of a pipeline -> component -> its network."""
    found: dict[str, dict[str, nn.Module]] = {}
    for component, module in _modules(pipe).items():
        for owner in conditionings(module):
            for name in owner.concepts:
                found.setdefault(name, {})[component] = module
    return found


def component_at_top(components: Iterable[str]) -> str | None:
    """Return the component whose adapter lies at the top of a folder: the denoiser, of two the first."""
    return next((name for name in components if name in DENOISERS), None)


def _modules(pipe: AnyPipeline) -> dict[str, nn.Module]:
    """Return the pipeline's networks by the names of their components, without the wrappers of torch.compile."""
    if not isinstance(getattr(pipe, "components", None), dict):
        raise UserTypeError(f"An adapter is loaded into a diffusers pipeline, not into a {type(pipe).__name__}.")
    modules = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            modules[name] = cast(nn.Module, getattr(component, "_orig_mod", component))
            if isinstance(component, PeftModel):
                raise UserValueError(
                    f"pipe.{name} is a PeftModel, which pipelines cannot save. Set pipe.{name} = "
                    f"pipe.{name}.get_base_model() first; adapters stay attached."
                )
    if not modules and hasattr(pipe, "load_components"):
        raise UserValueError(f"{type(pipe).__name__} has no networks yet. Load them first: pipe.load_components().")
    return modules


def _find(folder: Path, modules: Iterable[str], adapter_name: str) -> dict[str | None, Path]:
    """Where the adapters lie, by component; None is the one at the top."""
    places: dict[str | None, Path] = {None: folder}
    for name in modules:
        named = folder / name / Path(adapter_name).name  # where a saved pipeline has them
        places[name] = named if (named / CONFIG).exists() else folder / name
    return {name: path for name, path in places.items() if (path / CONFIG).exists()}


def _what_else(folder: Path, modules: Iterable[str], adapter_name: str) -> str:
    """Say what a folder without an adapter of that name holds instead, as a sentence that goes on; "" if nothing."""
    named = sorted({path.parent.name for name in modules for path in folder.glob(f"{name}/*/{CONFIG}")})
    if named:
        return (
            f" It holds adapters of other names, and {adapter_name!r} is looked for: load each with adapter_name=, "
            f"which is one of {quoted(named)}."
        )
    told = unfinished(folder)
    return f" {told}" if told else ""


def unfinished(folder: Path) -> str:
    """Say what to do with the folder of a training that is not finished; "" if it is none."""
    checkpoints = ", ".join(map(str, checkpoint_steps(folder).values()))
    return f"Its training is not finished: resume it, or use a checkpoint: {checkpoints}." if checkpoints else ""


def _component_for(pipe: AnyPipeline, modules: dict[str, nn.Module], config: CausalContextConfig, source: str) -> str:
    """Which component an adapter was trained for: by the recorded name or class, denoisers first."""
    trained_for = (config.auto_mapping or {}).get("base_model_class")
    ordered = sorted(modules, key=lambda name: name not in DENOISERS)
    if config.component is None and trained_for:
        wanted, fitting = f"a {trained_for}", [name for name in ordered if type(modules[name]).__name__ == trained_for]
    else:
        names = DENOISERS if config.component is None else (config.component,)
        wanted, fitting = f"a component {' or '.join(map(repr, names))}", [name for name in ordered if name in names]
    if fitting:
        return fitting[0]
    classes = ", ".join(f"{name}: {type(module).__name__}" for name, module in modules.items())
    base = f" (base {config.base_model_name_or_path!r})" if config.base_model_name_or_path else ""
    raise AdapterError(
        f"{source}{base} needs {wanted}, which {type(pipe).__name__} does not have (it has "
        f"{classes or 'no networks'}). Load it into the kind of pipeline that it was trained for."
    )


def _check_name(module: nn.Module, component: str, adapter_name: str) -> None:
    if adapter_name in getattr(module, "peft_config", {}):
        raise UserValueError(
            f"pipe.{component} already has an adapter {adapter_name!r}. Unload it first, or give another adapter_name."
        )
    check_adapter_name(adapter_name, module)


def _check_order(module: nn.Module, component: str, config: CausalContextConfig, source: str) -> None:
    """Refuse what PEFT cannot load beside an adapter that keeps whole modules or tokens."""
    plain = not config.modules_to_save and config.trainable_token_indices is None
    others: dict[str, PeftConfig] = getattr(module, "peft_config", {})
    if plain and others and any(isinstance(inner, AuxiliaryTrainingWrapper) for inner in module.modules()):
        raise UserValueError(
            f"An adapter with whole modules or trained tokens is loaded into pipe.{component}, and {source} has none, "
            f"which PEFT cannot load after it. Unload the other one, load {source} first, then the other one."
        )


def _check_weights_are_here(module: nn.Module, component: str) -> None:
    if any(_is_offloaded(inner) for inner in list(module.modules())[1:]):
        raise UserValueError(
            f"Parts of pipe.{component} are offloaded one by one (sequential or group offloading). Load the adapter "
            "first, then enable offloading."
        )


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers moves the weights; others cast or cache, or move inputs only."""
    accelerate, diffusers = getattr(module, "_hf_hook", None), getattr(module, "_diffusers_hook", None)
    moving = any(getattr(hook, "offload", False) for hook in getattr(accelerate, "hooks", [accelerate]))
    return moving or (diffusers is not None and diffusers.get_hook("group_offloading") is not None)


def _attach(
    module: nn.Module, config: CausalContextConfig, weights: dict[str, Tensor], adapter_name: str, source: str
) -> None:
    before = next((list(layer.active_adapters) for layer in adapted_layers(module).values()), [])
    # PEFT freezes what it adapts; a pipeline that is only used shall stay as it is.
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    config.inference_mode = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several adapters are meant
        inject_adapter_in_model(config, module, adapter_name)
    for parameter in trainable:
        parameter.requires_grad_(True)
    layers = adapted_layers(module)
    loaded = set_peft_model_state_dict(module, weights, adapter_name)
    missing = [key for key in loaded.missing_keys if f".{adapter_name}." in key]
    if missing or loaded.unexpected_keys:  # all names were checked; this is for versions of PEFT that match otherwise
        raise not_whole(source, [*missing, *loaded.unexpected_keys])
    for layer in layers.values():
        layer.set_adapter([*before, adapter_name], inference_mode=True)
    if hasattr(module, "set_adapters"):  # diffusers' own adapter calls ask for it
        cast(Any, module)._hf_peft_config_loaded = True


def _detach(module: nn.Module, adapter_name: str) -> None:
    owners = conditionings(module)  # without adapters, layers do not show them
    layers = adapted_layers(module).values()
    for layer in layers:
        if adapter_name in layer.causal_context_down:
            layer.delete_adapter(adapter_name)
    for copies in [inner for inner in module.modules() if isinstance(inner, AuxiliaryTrainingWrapper)]:
        if adapter_name in copies._adapters:
            copies.delete_adapter(adapter_name, sorted(copies._adapters - {adapter_name})[:1])
    configs: dict[str, PeftConfig] = getattr(module, "peft_config", {})
    configs.pop(adapter_name, None)
    if not any(layer.causal_context_down for layer in layers):
        unwrap(module, owners)


def unwrap(module: nn.Module, owners: Iterable[Conditioning], keep: str | None = None) -> None:
    """Take adapted layers off a network, and what else PEFT put around its modules if no config of an adapter is left.

    `owners` are its conditionings; `keep` is the adapter whose copies of whole modules (`modules_to_save`) stay in
    place of the base's.
    """
    for owner in owners:
        owner.remove(module)
    for path, inner in list(module.named_modules()):
        if isinstance(inner, CausalContextLayer):
            module.set_submodule(path, inner.base_layer)
    if not getattr(module, "peft_config", {}):
        for path, inner in list(module.named_modules()):
            if isinstance(inner, AuxiliaryTrainingWrapper):
                kept = inner.modules_to_save[keep] if keep and isinstance(inner, ModulesToSaveWrapper) else None
                module.set_submodule(path, kept or cast(Any, inner).original_module)
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            module.__dict__.pop(attribute, None)
