"""Whether the adapters that a context is for can act: they are on the model, active, and have what is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from ...contexts import ConceptSet
from ...errors import UserValueError
from ...messages.wording import quoted


def holds(model: nn.Module, path: str, layer: object) -> bool:
    """Whether a layer is still at its path in a model, or what others have put around it there."""
    try:
        place = model.get_submodule(path)
    except AttributeError:  # a wrapper hides the path
        return True
    return any(module is layer for module in place.modules())


def check_known(adapter_name: str, adapters: Iterable[str]) -> None:
    """Refuse (ValueError) a name that no adapter has."""
    if adapter_name not in adapters:
        raise UserValueError(f"Unknown adapter {adapter_name!r}. This model has: {quoted(adapters)}.")


def check_unasked(request: object | None) -> None:
    """Refuse (ValueError) a context that is in force for adapters that are off the model."""
    if request is not None:
        raise UserValueError(
            "A context is set for causal context adapters that were taken off the model since, so it would change "
            "nothing. Load them again, or leave the context out."
        )


def check_whole(elsewhere: Mapping[str, Collection[str]]) -> None:
    """Refuse (ValueError) a context that came to a denoiser past its pipeline, and so to one part of an adapter."""
    for name, components in elsewhere.items():
        raise UserValueError(
            f"The context in the attention arguments came to the denoiser alone, and adapter {name!r} has a part in "
            f"{quoted(components)}, too. So it is where a pipeline was made of another one (from_pipe). Open "
            "`with intervene(pipe, context):` around the call instead."
        )


def check_active(addressed: Iterable[str], active: Iterable[str]) -> None:
    """Refuse (ValueError) a context for adapters that are all switched off."""
    if not set(addressed) & set(active):
        raise UserValueError(
            f"A context would change nothing: the adapters it is for, {quoted(addressed)}, are not active. Active: "
            f"{quoted(active) or 'none'}. Activate them beside those: set_adapters([...]) of a pipeline or a model of "
            "diffusers, set_adapter(...) of others."
        )


def check_observational_part(addressed: Collection[str], ranks: Mapping[str, int]) -> None:
    """Refuse (ValueError) a strength of the observational part for adapters that have none."""
    if not any(ranks[name] for name in addressed):
        raise UserValueError(
            f"The strength of the observational part was given, but {quoted(addressed)} "
            f"{'has' if len(addressed) == 1 else 'have'} none (observational_rank=0). Leave it out, or train the "
            "adapter with such a part."
        )


def check_merged_context(name: str, concepts: ConceptSet, merged: Tensor, asked: Tensor) -> None:
    """Refuse (ValueError) a context that differs from the one in the weights, as strengths (rows, 1 + K) of both."""
    if not bool((asked == merged.to(asked)).all()):
        raise UserValueError(
            f"Adapter {name!r} is merged for the context {str(concepts.contexts(merged)[0])!r}; another one would "
            "change nothing. Call unmerge_adapter() (of a pipeline, unfuse_lora()) first."
        )


def check_not_merged_over(asked: Iterable[str], on_layer: Collection[str], merged: Iterable[str]) -> None:
    """Refuse (ValueError) contexts for adapters on a layer into whose weight others are merged."""
    for name in asked:
        if name in on_layer:
            raise UserValueError(
                f"A context is set for adapter {name!r}, which does not act beside adapters that are merged into "
                f"weights: {quoted(merged)}. Merge it, too, inside `with intervene(model, context, adapter_name="
                f"{name!r}):`, or call unmerge_adapter() (of a pipeline, unfuse_lora()) first."
            )
