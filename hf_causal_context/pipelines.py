"""Adapters in stock diffusers pipelines: load them from a folder or the Hub, and take them off again.

An adapter is a folder or repository with the denoiser's adapter at the top; those of other components (text encoders)
lie in sub-folders with the components' names. So does every adapter of a saved pipeline.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from .adapter.compatibility import check_fits
from .adapter.conditioning import conditionings
from .adapter.config import CausalContextConfig
from .adapter.layer import adapted_layers
from .adapter.pipeline import follow, unfollow
from .contexts import quoted

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Pipeline = TypeVar("Pipeline", bound="DiffusionPipeline")

_DENOISERS = ("unet", "transformer")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_context_adapter(
    pipe: Pipeline,
    repo_or_folder: str | Path,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Pipeline:
    """Attach an adapter to a pipeline, in place, and return the pipeline.

    Contexts are set by `intervene(pipe, ...)`, or by ``cross_attention_kwargs={"context": ...}`` (or
    `joint_attention_kwargs`, `attention_kwargs`) where the pipeline has such an argument: one for all prompts, or a
    list with one per prompt or per image. Without a context the pipeline does what it did. Weights take the dtype and
    device of the pipeline's. Several adapters can be loaded under names of their own, and all are active.

    Args:
        repo_or_folder: a folder, or the id of a repository on the Hub.
        adapter_name: what to call it.
        revision: of the repository.
        token: for private repositories, as in huggingface_hub.

    Raises:
        OSError: for something that holds no adapter, or cannot be reached.
        ValueError: for another kind of adapter, one that was trained for another model, a name that is taken, or a
            pipeline with sequential or group offloading (load the adapter first).

    Example:
        >>> pipe = load_context_adapter(pipe, "user/digits-context")   # doctest: +SKIP
        >>> with intervene(pipe, "thickness+slant"):                   # doctest: +SKIP
        ...     pipe()
    """
    modules = _modules(pipe)
    folder = _folder(str(repo_or_folder), modules, adapter_name, revision, token)
    found = _find(folder, modules, adapter_name)
    if not found:
        raise FileNotFoundError(
            f"{repo_or_folder} holds no adapter: there is no {_CONFIG} in it, or in a sub-folder with the name of a "
            f"component of the pipeline ({quoted(modules)})."
        )
    chosen: dict[str, tuple[Path, CausalContextConfig]] = {}
    for name, path in found.items():
        config = _config(path, str(repo_or_folder))
        component = name or _component_for(pipe, modules, config, str(repo_or_folder))
        _check(modules[component], component, path, config, adapter_name)
        chosen[component] = path, config
    if len({config.concepts for _, config in chosen.values()}) > 1:
        listed = "; ".join(f"{name}: {quoted(config.concepts)}" for name, (_, config) in chosen.items())
        raise ValueError(
            f"The parts of {repo_or_folder} have different concepts ({listed}), so they are not one adapter."
        )
    attached = []
    try:
        for component, (path, config) in chosen.items():
            attached.append(modules[component])
            _attach(modules[component], path, config, adapter_name)
    except BaseException:
        for module in attached:
            _detach(module, adapter_name)
        raise
    follow(pipe)
    return pipe


def unload_context_adapter(pipe: DiffusionPipeline, adapter_name: str | None = None) -> None:
    """Take one causal context adapter off a pipeline, or all: it is then what it was before.

    Raises:
        ValueError: without such an adapter, or while it is merged into the weights.
    """
    owners = {name: module for name, module in _modules(pipe).items() if conditionings(module)}
    loaded = {name for module in owners.values() for owner in conditionings(module) for name in owner.concepts}
    if not loaded or (adapter_name is not None and adapter_name not in loaded):
        raise ValueError(
            f"{type(pipe).__name__} has no causal context adapter"
            + (f" {adapter_name!r}. It has: {quoted(sorted(loaded))}." if adapter_name else ".")
        )
    names = loaded if adapter_name is None else {adapter_name}
    for component, module in owners.items():
        for layer in adapted_layers(module).values():
            if names & set(layer.merged_adapters):
                raise ValueError(
                    f"Adapters {layer.merged_adapters} are merged into the weights of pipe.{component}. Call "
                    f"pipe.{component}.unfuse_lora() (or unmerge_adapter()) first."
                )
    for module in owners.values():
        for name in names:
            _detach(module, name)
    if names == loaded:
        unfollow(pipe)


def _modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's networks by the names of their components, without the wrappers of torch.compile."""
    if not isinstance(getattr(pipe, "components", None), dict):
        raise TypeError(f"An adapter is loaded into a diffusers pipeline, not into a {type(pipe).__name__}.")
    modules = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            modules[name] = cast(nn.Module, getattr(component, "_orig_mod", component))
            if isinstance(component, PeftModel):
                raise ValueError(
                    f"pipe.{name} is a PeftModel, which pipelines cannot save. Set pipe.{name} = "
                    f"pipe.{name}.get_base_model() first; adapters stay attached."
                )
    return modules


def _folder(
    source: str, modules: dict[str, nn.Module], adapter_name: str, revision: str | None, token: str | bool | None
) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {source}. Give a folder, or the id of a repository: user/name.")
    places = ["", *(f"{name}/" for name in modules), *(f"{name}/{adapter_name}/" for name in modules)]
    patterns = [place + file for place in places for file in (_CONFIG, _WEIGHTS)]
    return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=patterns))


def _find(folder: Path, modules: dict[str, nn.Module], adapter_name: str) -> dict[str | None, Path]:
    """Where the adapters lie, by component; None is the one at the top."""
    places: dict[str | None, Path] = {None: folder}
    for name in modules:
        named = folder / name / adapter_name  # where a saved pipeline has them
        places[name] = named if (named / _CONFIG).exists() else folder / name
    return {name: path for name, path in places.items() if (path / _CONFIG).exists()}


def _config(folder: Path, source: str) -> CausalContextConfig:
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, CausalContextConfig):
        raise ValueError(
            f"{source} is a {config.peft_type} adapter; only causal context adapters have contexts. Load a LoRA with "
            "pipe.load_lora_weights."
        )
    if not (folder / _WEIGHTS).exists():
        raise FileNotFoundError(f"{source} has no {_WEIGHTS}. Adapters are read from safetensors only.")
    return config


def _component_for(
    pipe: DiffusionPipeline, modules: dict[str, nn.Module], config: CausalContextConfig, source: str
) -> str:
    """Which component an adapter was trained for: by the recorded class, denoisers first."""
    trained_for = (config.auto_mapping or {}).get("base_model_class")
    ordered = sorted(modules, key=lambda name: name not in _DENOISERS)
    fitting = [name for name in ordered if type(modules[name]).__name__ == trained_for]
    denoisers = [name for name in ordered if name in _DENOISERS]
    if fitting:
        return fitting[0]
    if trained_for is None and denoisers:
        return denoisers[0]
    classes = ", ".join(f"{name}: {type(module).__name__}" for name, module in modules.items())
    wanted = f"a {trained_for}" if trained_for else f"a component {' or '.join(map(repr, _DENOISERS))}"
    base = f" (base {config.base_model_name_or_path!r})" if config.base_model_name_or_path else ""
    raise ValueError(
        f"{source}{base} needs {wanted}, which {type(pipe).__name__} does not have (it has "
        f"{classes or 'no networks'}). Load it into the kind of pipeline that it was trained for."
    )


def _check(module: nn.Module, component: str, folder: Path, config: CausalContextConfig, adapter_name: str) -> None:
    if adapter_name in getattr(module, "peft_config", {}):
        raise ValueError(
            f"pipe.{component} already has an adapter {adapter_name!r}. Unload it first, or give another adapter_name."
        )
    if any(hasattr(inner, "_hf_hook") or hasattr(inner, "_diffusers_hook") for inner in list(module.modules())[1:]):
        raise ValueError(
            f"Parts of pipe.{component} are offloaded one by one (sequential or group offloading). Load the adapter "
            "first, then enable offloading."
        )
    with safe_open(folder / _WEIGHTS, "pt") as weights:
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118 (not a dict)
    check_fits(module, config, shapes, f"The adapter in {folder}")


def _attach(module: nn.Module, folder: Path, config: CausalContextConfig, adapter_name: str) -> None:
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
    loaded = set_peft_model_state_dict(module, load_file(folder / _WEIGHTS), adapter_name)
    missing = [key for key in loaded.missing_keys if f".{adapter_name}." in key]
    if missing or loaded.unexpected_keys:
        raise ValueError(
            f"The adapter in {folder} is not whole: it lacks {len(missing)} weights that its config asks for "
            f"{missing[:3]}, and has {len(loaded.unexpected_keys)} others {loaded.unexpected_keys[:3]}. It may have "
            "been trained for another base, or its files belong to different adapters."
        )
    for layer in layers.values():
        layer.set_adapter([*before, adapter_name], inference_mode=True)
    if hasattr(module, "set_adapters"):  # diffusers' own adapter calls ask for it
        cast(Any, module)._hf_peft_config_loaded = True


def _detach(module: nn.Module, adapter_name: str) -> None:
    layers = adapted_layers(module)
    for layer in layers.values():
        if adapter_name in layer.causal_context_down:
            layer.delete_adapter(adapter_name)
    configs: dict[str, PeftConfig] = getattr(module, "peft_config", {})
    configs.pop(adapter_name, None)
    for owner in conditionings(module):
        owner.concepts.pop(adapter_name, None)
        if not owner.concepts:
            owner.remove(module)
    if any(layer.causal_context_down for layer in layers.values()):
        return
    for path, layer in layers.items():
        module.set_submodule(path, layer.get_base_layer())
    if not configs:
        for path, inner in list(module.named_modules()):
            if isinstance(inner, AuxiliaryTrainingWrapper):
                module.set_submodule(path, cast(nn.Module, inner.original_module))
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            module.__dict__.pop(attribute, None)
