"""Which modules to adapt when the user names none, and which of those that are named cannot be adapted."""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..errors import UserError, UserValueError
from ..messages.wording import quoted
from .config import CausalContextConfig
from .fusion import is_fused
from .layer import adapted_class, unwrapped

# diffusers names the projections of attention alike in all its denoisers and autoencoders; the second row are the
# projections of the text stream in joint attention (SD3, Flux), the third are those of HiDream, and the last is of
# attention beside an MLP (FLUX.2).
_DIFFUSERS_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_q_t", "to_k_t", "to_v_t", "to_out_t"),
    "to_qkv_mlp_proj",
)
_DIFFUSERS_CONVOLUTIONS = ("conv1", "conv2")  # of residual blocks, for networks without attention
_TRANSFORMERS_ATTENTION = ("q_proj", "v_proj")  # what PEFT's table holds for most architectures
_T5_ATTENTION = ("q", "v")  # also of its kin that the table lacks, such as UMT5
# In the source of a class that computes with the weight of a child: beside a call, and in general. `init.zeros_(...)`
# does not compute. What is used otherwise than by its weight may be called.
_READ_BESIDE = re.compile(r"self\.(\w+)\.weight(?:\.squeeze\(| @|\[:, 0)")
_READ = re.compile(r"(?<!_\()self\.(\w+)\.weight(?=[],)]|\.(?:t|unsqueeze|type)\()")
_USED = r"self\.{}\b(?!\.(?:weight|bias)\b)(?!\s*=[^=])"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TOWER = re.compile("vision|visual|image|audio")  # in the paths of what reads, beside what writes
# What fused experts were before, where their names differ.
_FUSED_EXPERTS = {"gate_up_proj": ("gate_up_proj", "gate_proj", "up_proj")}


class TargetModulesError(UserError, NoMatchingPeftModuleError):
    """No module of the base matches `target_modules`, or only some of what it names does."""


def default_target_modules(model: nn.Module, model_config: dict) -> set[str] | str:
    """Attention projections of a known architecture of diffusers or transformers, as LoRA's defaults.

    Raises:
        ValueError: for an unknown architecture, or one of which they would leave out the part that writes.
    """
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_config.get("model_type", ""))
    if known is not None:
        return known if isinstance(known, str) else {name for name in known if _ends_with(model, name)} or set(known)
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    families = {
        "diffusers": (_DIFFUSERS_ATTENTION, _DIFFUSERS_CONVOLUTIONS),
        "transformers": (_TRANSFORMERS_ATTENTION, _T5_ATTENTION),
    }
    for library in sorted(libraries & families.keys()):
        for names in families[library]:
            present = {name for name in names if _ends_with(model, name)}
            if present and not _only_in_tower(model, present):
                # In some attention this is a layer, in other the list that holds it, so that each needs its path.
                own = {path for path, module in model.named_modules() if adapted_class(module) is not None}
                return present | {path for path in own if path.endswith(".to_out")}
    raise UserValueError(
        f"Please specify `target_modules` in the config: there are no defaults for {type(model).__name__}. "
        + describe_candidates(model)
    )


def all_linear(model: nn.Module, config: CausalContextConfig) -> set[str]:
    """Return what "all-linear" stands for: PEFT's choice, without modules that are excluded or never called."""
    named = copy.copy(config)
    _maybe_include_all_linear_layers(named, model)
    modules = dict(model.named_modules())
    return {
        path
        for path in named.target_modules or ()
        if check_target_module_exists(named, path)
        and adapted_class(modules[path]) is not None
        and not _is_only_read(model, path)
    }


def check_targets(model: nn.Module, config: CausalContextConfig, adapted: Sequence[str]) -> None:
    """Refuse what would be adapted in part only, without a word: modules that the model does not call, and no modules.

    Args:
        model: the base, which may carry other adapters.
        config: the adapter's.
        adapted: paths of the modules that it asks for; none at all is PEFT's error.

    Raises:
        ValueError: for projections that are fused, convolutions of a kind of their own, modules of which the model only
            reads the weight, and modules in two places.
        TargetModulesError: for experts that are parameters, and names and layers that no module belongs to.
    """
    name = type(model).__name__
    fused = [path for path in adapted if is_fused(model, path)]
    if fused:
        raise UserValueError(
            f"{len(fused)} of the target modules, such as {fused[0]!r}, are fused with others, so {name} no longer "
            "calls them and the adapter would act in part only. Call unfuse_qkv_projections() of the model or the "
            "pipeline first, and leave them apart."
        )
    fast = [path for path in adapted if _is_on_fast_path(model, path)]
    if fast:
        raise UserValueError(
            f"At inference, torch computes with the weight of {fast[0]!r} and does not call the module (the fast path "
            "of nn.TransformerEncoderLayer), so an adapter on it would have no effect. Call "
            "torch.backends.mha.set_fastpath_enabled(False) first, or leave out "
            f"{_leaves(fast)}."
        )
    own = [path for path in adapted if _convolves_otherwise(model.get_submodule(path))]
    if own:
        raise UserValueError(
            f"{own[0]!r} of {name} is a {type(unwrapped(model.get_submodule(own[0]))).__name__}, which pads or "
            "turns its input before it convolves, and an adapter on it would convolve what it is given. Leave out "
            f"{_leaves(own)}."
        )
    if config.inference_mode:  # a stored adapter acts as it did in its training: its weights name its modules
        return
    read = [path for path in adapted if _is_only_read(model, path)]
    if read:
        raise UserValueError(
            f"{name} computes with the weight of {read[0]!r} and does not call the module, so an adapter on it would "
            f"have no effect. Leave out {_leaves(read)}."
        )
    if places := _in_two_places(model, adapted):
        raise UserValueError(
            f"{name} has one module in two places, {quoted(places)}, and an adapter would act in the first only. Leave "
            "it out with exclude_modules, or give each place a module of its own."
        )
    experts = [path for path in _experts(model) if check_target_module_exists(config, path)]
    if experts:
        leaves = sorted({".".join(path.split(".")[-2:]) for path in experts})
        raise TargetModulesError(
            f"target_modules names experts that {name} holds as parameters, such as {experts[0]!r}, and the adapter "
            f"acts on modules only. Leave them out with exclude_modules={leaves}, which keeps other modules of these "
            "names."
        )
    unmatched = [*_unmatched(config, adapted)] if adapted else []
    if unmatched:
        held = f" {name} holds its experts as parameters, which it does not act on." if any(_experts(model)) else ""
        raise TargetModulesError(
            f"Nothing that is adapted matches {', '.join(unmatched)}.{held} Correct it, or leave it out. "
            f"{describe_candidates(model)}"
        )


def _unmatched(config: CausalContextConfig, adapted: Sequence[str]) -> Iterator[str]:
    """What of a config no adapted module belongs to, as messages call it."""
    if not isinstance(config.target_modules, str):
        for name in sorted(config.target_modules or ()):
            if not any(path == name or path.endswith(f".{name}") for path in adapted):
                yield f"{name!r} of target_modules"
    layers = config.layers_to_transform
    for index in [layers] if isinstance(layers, int) else layers or ():
        alone = copy.copy(config)
        alone.layers_to_transform = [index]
        if not any(check_target_module_exists(alone, path) for path in adapted):
            yield f"{index} of layers_to_transform"


def _in_two_places(model: nn.Module, adapted: Sequence[str]) -> list[str]:
    """Return two paths of an adapted module, other than through a parent that is itself in two places."""
    paths: defaultdict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
    for path in adapted:
        places = {}
        for each in paths[model.get_submodule(path)]:
            parent, _, name = each.rpartition(".")
            places[model.get_submodule(parent), name] = each
        if len(places) > 1:
            return list(places.values())[:2]
    return []


def _leaves(paths: Iterable[str]) -> str:
    """Return the last names of modules, as target_modules may name them, for a message."""
    return quoted(sorted({path.rpartition(".")[2] for path in paths}))


def _is_on_fast_path(model: nn.Module, path: str) -> bool:
    parent = model.get_submodule(path.rpartition(".")[0])
    inside = parent is not model  # which has hooks, and layers with hooks do not take the path
    return inside and isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()


def _is_only_read(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name in _read_weights(type(model.get_submodule(parent)))


def _convolves_otherwise(module: nn.Module) -> bool:
    """Whether the class of a convolution does something to its input, so that other sizes come out than of torch's."""
    base: Any = unwrapped(module)
    torchs: Any = next((cls for cls in _CONVOLUTIONS if isinstance(base, cls)), None)
    if torchs is None or type(base).forward is torchs.forward:
        return False
    like: Any = copy.copy(base)
    like._parameters = {
        name: weight if weight is None else nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        for name, weight in base._parameters.items()
    }
    size = [reach * (kernel - 1) + 5 for reach, kernel in zip(base.dilation, base.kernel_size, strict=True)]
    size[-1] += base.in_channels  # it would not do as the number of channels
    x = torch.empty(1, base.in_channels, *size, dtype=base.weight.dtype, device="meta")
    try:
        return type(base).forward(like, x).shape != torchs.forward(like, x).shape
    except (RuntimeError, TypeError, ValueError):
        return True


@lru_cache
def _read_weights(parent: type[nn.Module]) -> frozenset[str]:
    """Names of children whose weight a class computes with, in place of a call or, as Mamba and its kin, beside it."""
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):  # of classes without a file
        return frozenset()
    in_place = {name for name in _READ.findall(source) if not re.search(_USED.format(name), source)}
    return frozenset(_READ_BESIDE.findall(source)) | in_place


def _experts(model: nn.Module) -> Iterator[str]:
    """Paths of the experts that are parameters of three dimensions, under the names they have as modules, too."""
    for path, parameter in model.named_parameters():
        parent, _, name = path.rpartition(".")
        if parameter.ndim == 3 and parent.endswith("experts"):
            yield from (f"{parent}.{each}" for each in _FUSED_EXPERTS.get(name, (name,)))


def describe_candidates(model: nn.Module, limit: int = 20) -> str:
    """Return a sentence that lists names of modules an adapter fits on, most frequent first."""
    names: Counter[str] = Counter()
    for path, module in model.named_modules():
        inside_adapter = "causal_context_" in path or path.endswith(".base_layer")
        if path and not inside_adapter and adapted_class(module) is not None:
            parts = path.split(".")
            names[parts[-1] if not parts[-1].isdigit() else ".".join(parts[-2:])] += 1
    if not names:
        return "It has no Linear or convolution to adapt."
    listed = ", ".join(f"{name!r} ({count})" for name, count in names.most_common(limit))
    return f"Candidates: {listed}{', ...' if len(names) > limit else ''}."


def _ends_with(model: nn.Module, name: str) -> bool:
    return any(_paths_of(model, name))


def _only_in_tower(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether a model writes text, and these names are of the part alone that reads its images or sounds."""
    writes = getattr(model, "can_generate", None)
    return writes is not None and writes() and all(_TOWER.search(p) for name in names for p in _paths_of(model, name))


def _paths_of(model: nn.Module, name: str) -> Iterator[str]:
    for path, module in model.named_modules():
        if (path == name or path.endswith(f".{name}")) and adapted_class(module) is not None:
            yield path
