"""Which modules to adapt when the user names none, and what to say when nothing fits."""

from __future__ import annotations

from collections import Counter

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..errors import UserValueError
from .layer import adapted_class

# diffusers names the projections of attention alike in all its denoisers and autoencoders; the second row are the
# projections of the text stream in joint attention (SD3, Flux).
_DIFFUSERS_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
_DIFFUSERS_CONVOLUTIONS = ("conv1", "conv2")  # of residual blocks, for networks without attention
_TRANSFORMERS_ATTENTION = ("q_proj", "v_proj")  # what PEFT's table holds for most architectures


def default_target_modules(model: nn.Module, model_config: dict) -> set[str] | str:
    """Attention projections of a known architecture of diffusers or transformers, as LoRA's defaults.

    Raises:
        ValueError: for an unknown architecture.
    """
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_config.get("model_type", ""))
    if known is not None:
        return known if isinstance(known, str) else set(known)
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    families = {
        "diffusers": (_DIFFUSERS_ATTENTION, _DIFFUSERS_CONVOLUTIONS),
        "transformers": (_TRANSFORMERS_ATTENTION,),
    }
    for library in sorted(libraries & families.keys()):
        for names in families[library]:
            present = {name for name in names if _ends_with(model, name)}
            if present:
                return present
    raise UserValueError(
        f"Please specify `target_modules` in the config: there are no defaults for {type(model).__name__}. "
        + describe_candidates(model)
    )


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
    return any(
        (path == name or path.endswith(f".{name}")) and adapted_class(module) is not None
        for path, module in model.named_modules()
    )
