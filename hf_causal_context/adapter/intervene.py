"""`intervene`: sets the contexts of adapted models and pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..contexts import ContextBatch, ContextLike, as_contexts
from ..errors import UserTypeError, UserValueError
from .announced_generate import AnnouncedGenerate, WholeBatches
from .calibration import calibrated_context, calibrated_mask
from .conditioning.hooks import Conditioning
from .conditioning.in_force import in_force, is_inside
from .conditioning.presence import check_unasked
from .conditioning.regional import check_denoiser
from .conditioning.regions import read_regions
from .conditioning.request import Request, normalize
from .followed_pipeline import track_calls
from .lookup import conditionings

if TYPE_CHECKING:
    from .followed_pipeline import AnyPipeline


class intervene:  # noqa: N801 (reads like torch.no_grad)
    """Set the context of a model's adapters for the body of a `with` statement.

    Args:
        model: a model with a causal context adapter (a PeftModel, or any model an adapter was injected into), or a
            diffusers pipeline, stock or modular, with such models: it knows by itself how it multiplies samples.
        context: one context for the batch (a `Context`, a name, ``"a+b"``, a mapping name -> strength, a tuple of
            names), a list with one per sample (of a pipeline: per prompt, or per image), or a float mask (S, K) with
            the columns in the order of the adapter's concepts. ``()`` is the observational context: the world of the
            data, with nothing intervened on. Outside of `intervene` the model is the base, bit for bit.
        masks: regions of the image with contexts of their own: name -> mask, an image or an array (H, W) of the image's
            size, 1 inside. The contexts have the same names: ``{"left": "thick", "right": "slant"}``. One more is that
            of the background, by default ``()``; text has it, too.
        adapter_name: the adapter meant, when several active ones share a concept; the others keep their context.
        images_per_prompt: for a model inside a pipeline: how many images the pipeline makes of each sample.
        observational: strength of the adapter's observational part: 1 is the look of the data, 0 that of the base, for
            "this concept, in the base's own style". By default 1, or what the contexts say themselves.
        guidance_copies: for a model inside a pipeline: copies of the batch that it stacks in one call for
            classifier-free guidance; calls without them are served too.
        calibrated: the strengths are positions of the dials that `evaluate --calibrate` stored with the adapter: equal
            steps of a dial are equal changes, 0 and 1 stay what they are. They are read here: a hot swap in the body
            changes the weights, not the strengths.

    Nested uses replace each other. Rows of `generate` (beams, returned sequences) are matched without being told.

    The context belongs to this task or thread, and reaches tasks and threads that are started in the body, which must
    not outlive it, but not an executor's workers. Open it around each call where steps of a generator run by turns.

    Raises:
        TypeError: for values that are not contexts or masks, or for something that is neither a module nor a pipeline.
        ValueError: for a model without the adapter, unknown names, wrong masks, a concept that two adapters share, or
            a strength of the observational part for adapters that have none, or calibrated strengths without a
            calibration.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from hf_causal_context import CausalContextConfig
        >>> config = CausalContextConfig(concepts=("thick", "slant"), target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 2)), config)
        >>> x = torch.zeros(3, 4)
        >>> with intervene(model, [("thick",), (), {"slant": -0.5}]):
        ...     y = model(x)
        >>> with intervene(model, "thick", observational=0):
        ...     y = model(x)
    """

    def __init__(
        self,
        model: nn.Module | AnyPipeline,
        context: ContextBatch | Mapping[str, ContextLike],
        *,
        masks: Mapping[str, Any] | None = None,
        adapter_name: str | None = None,
        images_per_prompt: int = 1,
        guidance_copies: int = 1,
        observational: float | None = None,
        calibrated: bool = False,
    ) -> None:
        owners = [find_conditioning(model)] if isinstance(model, nn.Module) else _of_pipeline(model)
        # Of several adapted components of a pipeline only some may have an adapter of that name.
        owners = [owner for owner in owners if adapter_name in owner.concepts] or owners
        self._pipe = None if isinstance(model, nn.Module) else model
        contexts, regions = (context, None) if masks is None else read_regions(context, masks)
        asked = cast(ContextBatch, contexts)
        self._requests = [  # errors show here, before any work
            owner.make_request(
                _calibrated(owner, asked, adapter_name) if calibrated else asked,
                adapter_name,
                images_per_prompt,
                guidance_copies,
                observational,
            )
            for owner in owners
        ]
        if regions is not None:
            check_denoiser(owners)
            self._requests = [request.over(regions) for request in self._requests]
        if isinstance(model, nn.Module) and not isinstance(model, PeftModel | BaseTuner):  # these ask their base's
            for method in (AnnouncedGenerate, WholeBatches):  # of a model whose part has the adapter
                method.put_on(model)
        self._entered: list[tuple[ExitStack, list[Request]]] = []  # by all threads and tasks that use this object

    def __enter__(self) -> None:
        for request in self._requests:
            check_unasked(None if cast(Conditioning, request.owner).alive else request)
        with ExitStack() as stack:
            opened = stack.enter_context(in_force(self._requests))
            if self._pipe is not None:
                stack.enter_context(track_calls(self._pipe))
            self._entered.append((stack.pop_all(), opened))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered = reversed(self._entered)
        own = next((each for each in entered if any(map(is_inside, each[1]))), self._entered[-1])
        self._entered.remove(own)
        own[0].close()


def _calibrated(owner: Conditioning, context: ContextBatch, adapter_name: str | None) -> ContextBatch:
    """Return what a context means whose strengths are positions of dials; `make_request` refuses what is none."""
    active = owner.active_adapters() if adapter_name is None else owner.concepts
    addressed = {name: own for name, own in active.items() if adapter_name in (None, name)}
    knots = {concept: own for name in addressed for concept, own in owner.calibrations[name].items()}
    contexts, mask = normalize(context, None)
    if mask is None:
        mapped = [calibrated_context(each, knots) for each in contexts]
        return mapped if as_contexts(context) is not None else mapped[0]
    if len(addressed) != 1:
        return mask
    (concepts,) = addressed.values()
    return calibrated_mask(mask, concepts, knots)


def _of_pipeline(pipe: AnyPipeline) -> list[Conditioning]:
    if not isinstance(getattr(pipe, "components", None), dict):
        raise UserTypeError(
            f"intervene() takes a model (nn.Module) or a diffusers pipeline, not {type(pipe).__name__}. Pass for "
            "example pipe or pipe.unet."
        )
    found = conditionings(pipe)
    if not found:
        raise UserValueError(
            f"No component of {type(pipe).__name__} has a causal context adapter, so a context would change nothing. "
            "Load one with load_context_adapter(pipe, folder_or_repository)."
        )
    return found


def find_conditioning(model: nn.Module) -> Conditioning:
    """Return the conditioning of the adapted layers inside a model.

    Raises:
        ValueError: for a model without a causal context adapter, or with several adapted models inside.
    """
    found = conditionings(model)
    if len(found) > 1:
        raise UserValueError(
            f"{type(model).__name__} holds {len(found)} models with adapters of their own. Pass one of them to "
            "intervene(), and nest its uses for several."
        )
    if found:
        return found[0]
    raise UserValueError(
        f"{type(model).__name__} has no causal context adapter, so a context would change nothing. Attach one with "
        "get_peft_model(model, CausalContextConfig(...)) or load one with PeftModel.from_pretrained."
    )
