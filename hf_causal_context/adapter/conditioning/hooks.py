"""Delivers contexts to the layers: one pair of hooks on the base model, and what is asked of it.

    intervene(model, ...)  --> a request, see in_force          |  pre-hook: rows of the model's input are matched,
    model(..., context=x)  --> a request, for this call         |  a frame holds strengths   --> layers read the frame

Diffusers pipelines that cannot pass `context=` pass it inside the attention arguments of their denoiser.

Strengths (rows, 1 + K) are of the observational part, then of the concepts; a user's mask leaves out the part, at 1.

Shapes: S samples that have a context, N rows of the model's input, n rows of a layer's input, K concepts.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...contexts import ConceptSet, Context, ContextBatch
from ...errors import UserValueError
from ...functional import per_feature
from ..calibration import Calibration
from .frame import Frame, rows_in_doubt
from .in_force import STATE, innermost_request
from .matrices import MixingLayer, autocast_dtype, causal_matrices
from .presence import (
    check_active,
    check_known,
    check_merged_context,
    check_not_merged_over,
    check_observational_part,
    check_unasked,
    check_whole,
    holds,
)
from .recomputation import carry_frames_into_recomputation, in_backward, unknown_recomputation
from .regions import places
from .request import (
    AdapterContext,
    Request,
    check_mask_is_for,
    check_names,
    check_one_adapter_per_mask,
    completed,
    for_mechanism,
    normalize,
    restricted,
)
from .rows import input_rows, is_stacked, match_layer_rows, refuse_other_orders


class AdaptedLayer(MixingLayer, Protocol):
    """What is asked of a layer with adapters."""

    concepts: dict[str, ConceptSet]  # of each adapter
    training: bool

    @property
    def active_adapters(self) -> Iterable[str]: ...  # of other methods, too

    @property
    def merged(self) -> bool: ...  # whether adapters are merged into the weight


# Arguments of pipelines and denoisers that carry a dictionary to attention processors.
_ATTENTION_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class Conditioning:
    """The pair of hooks on one base model, and the adapters that its layers carry."""

    changes = 0  # how often adapters or hooks were put on a model, swapped or taken off, in this process

    def __init__(self, layer: AdaptedLayer) -> None:
        # Any of them: PEFT activates and deactivates adapters on all layers alike. Weak: see `alive`.
        self._layer = weakref.ref(layer)
        self.concepts: dict[str, ConceptSet] = {}
        self.open_requests = 0  # in all tasks and threads
        self.observational_ranks: dict[str, int] = {}
        self.calibrations: dict[str, Calibration] = {}
        self.merged: dict[str, Tensor] = {}  # adapters in weights, of whatever layers -> their strengths (1, 1 + K)
        self.elsewhere: dict[str, list[str]] = {}  # adapter -> components of a pipeline that have parts of it, too
        self._model: weakref.ref[nn.Module] | None = None
        # The number of changes when the model was looked through, and its adapted layers.
        self._found: tuple[int, list[weakref.ref[AdaptedLayer]]] = -1, []
        self._handles: list[RemovableHandle] = []
        self._takes_context = True

    def install(self, model: nn.Module, on_removal: Callable[[nn.Module], None]) -> None:
        """Put the hooks on a base model, once, and look at its layers; `on_removal` is called when they come off."""
        if not self._handles:
            for hook in list(model._forward_pre_hooks.values()):
                if isinstance(previous := getattr(hook, "__self__", None), Conditioning):
                    previous.remove(model)
            self._on_removal = on_removal
            self._model = weakref.ref(model)
            # A model with an argument of that name keeps it; there, only intervene() sets contexts.
            self._takes_context = "context" not in inspect.signature(model.forward).parameters
            self._handles = [
                model.register_forward_pre_hook(self._enter_forward, with_kwargs=True, prepend=True),
                model.register_forward_hook(self._leave_forward, always_call=True),
            ]
        Conditioning.changes += 1
        self._layers(model)  # compiled graphs do not look

    def __getstate__(self) -> dict[str, Any]:
        # A copied layer copies no whole model.
        return self.__dict__ | {"_layer": self._layer(), "_model": None, "_found": (-1, [])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_layer": weakref.ref(state["_layer"]), "open_requests": 0}
        Conditioning.changes += 1  # a copy has hooks, too

    @property
    def alive(self) -> bool:
        """Whether an adapter is still there: others may have taken it off (diffusers' unload_lora, delete_adapters)."""
        layer, model = self._layer(), self._model and self._model()
        # A layer that is off may live on: hooks of others refer to it in a circle.
        return layer is not None and bool(self.concepts) and (model is None or holds(model, layer.name, layer))

    @property
    def layer(self) -> AdaptedLayer:
        """One of the adapted layers."""
        layer = self._layer()
        assert layer is not None, "the adapter was removed"
        return layer

    def remove(self, model: nn.Module) -> None:
        """Take the hooks off a base model again."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._on_removal(model)
            Conditioning.changes += 1
        self._handles = []

    def active_adapters(self) -> dict[str, ConceptSet]:
        """Active adapters of this method and their concepts."""
        return {name: self.concepts[name] for name in self.layer.active_adapters if name in self.concepts}

    def request(self) -> Request | None:
        """Return the innermost request in force here for this model."""
        return innermost_request(self)

    def strengths_for(self, layer: AdaptedLayer, adapter_name: str, x: Tensor, num_rows: int) -> Tensor | None:
        """The strengths (1, 1 + K) or (n, 1 + K) for a layer's input of n rows; None without a context at inference.

        Raises:
            ValueError: without a context in training mode, or when rows cannot be matched.
            RuntimeError: in a recomputation that does not know its context.
        """
        concepts = layer.concepts[adapter_name]
        frame = STATE.box.frame
        if frame is not None and frame.owner is self:
            strengths = frame.strengths.get(adapter_name)
            if strengths is None and frame.request is not None:
                strengths = self._resolve(frame, frame.request, adapter_name, concepts)
        else:
            strengths = self._strengths_outside_forward(layer, adapter_name, x, num_rows)
        if strengths is None:
            if layer.training:
                raise UserValueError(
                    f"No context is set for adapter {adapter_name!r} in training mode. Train inside `with "
                    "intervene(model, contexts):` or pass context= to the model; the observational context is (). "
                    "For inference call model.eval()."
                )
            return None
        return match_layer_rows(strengths.to(x.device), num_rows, layer.name, *rows_in_doubt(frame, layer.name, x))

    def causal_matrix(self, layer: AdaptedLayer, adapter_name: str, num_rows: int) -> Tensor | None:
        """Return what mixes the features of a layer's n rows, (1 or n, S, S); None if it is to mix them itself.

        It is there inside a forward of the model, for the mechanisms that mix.
        """
        frame = STATE.box.frame
        matrix = frame.matrices.get(adapter_name, {}).get(layer.name) if frame is not None else None
        if frame is None or matrix is None or frame.owner is not self:
            return None
        without = torch.is_grad_enabled() and not matrix.requires_grad
        if without and layer.causal(adapter_name).shift.requires_grad:
            return None  # it was made without gradients, by a forward that computes without them at first
        return match_layer_rows(matrix, num_rows, layer.name, frame.ragged, stacked=is_stacked(frame.model, layer.name))

    def _matrices(self, frame: Frame, request: Request, name: str, strengths: Tensor) -> dict[str, Tensor]:
        layers = [layer for layer in self._layers(frame.model) if name in layer.concepts]
        if request.call is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return causal_matrices(layers, name, strengths, frame.tokens)
        # Nothing is trained during a call of a pipeline or of `generate`, which runs the model again and again.
        changes = Conditioning.changes  # of adapters, which may be swapped between two steps
        key = name, strengths.shape, strengths.device, autocast_dtype(strengths.device), changes
        if key not in request.matrices:
            request.matrices[key] = causal_matrices(layers, name, strengths)
        return request.matrices[key]

    def _layers(self, model: nn.Module) -> list[AdaptedLayer]:
        """The adapted layers of the model, looked for when adapters came or went."""
        if not torch.compiler.is_compiling() and self._found[0] != Conditioning.changes:
            modules = (module for module in model.modules() if getattr(module, "conditioning", None) is self)
            self._found = Conditioning.changes, [weakref.ref(cast(AdaptedLayer, module)) for module in modules]
        layers = [found() for found in self._found[1]]
        return [layer for layer in layers if layer is not None]

    def repeated(self, strengths: Tensor, adapter_name: str, z_nTS: Tensor) -> Tensor:
        """`strengths_for` a layer, for each feature of an adapter: computed once for all layers that need the same."""
        frame = STATE.box.frame
        # Tensors that need gradients stay inside the checkpoint that made them; compilers find repetitions themselves.
        shared = frame is not None and strengths is frame.strengths.get(adapter_name) and not strengths.requires_grad
        if frame is None or not shared or torch.compiler.is_compiling():
            return self._per_feature(strengths, adapter_name, z_nTS)
        key = adapter_name, z_nTS.shape[-1], z_nTS.ndim, z_nTS.dtype
        if key not in frame.repeated:
            frame.repeated[key] = self._per_feature(strengths, adapter_name, z_nTS)
        return frame.repeated[key]

    def _per_feature(self, strengths: Tensor, adapter_name: str, z_nTS: Tensor) -> Tensor:
        part, num_concepts = self.observational_ranks[adapter_name], len(self.concepts[adapter_name])
        return per_feature(for_mechanism(strengths, num_concepts, part), z_nTS, part)

    def _strengths_outside_forward(
        self, layer: AdaptedLayer, adapter_name: str, x: Tensor, num_rows: int
    ) -> Tensor | None:
        # An encoder that generate() calls, or vae.decode(): a part of the model runs without the model's forward.
        if in_backward():
            raise unknown_recomputation()
        request = self.request()
        if request is None:
            return None
        context = request.find(adapter_name, layer.concepts[adapter_name])
        return None if context is None else context.to(x.device).outside_forward(num_rows, request.call, layer.name)

    def _resolve(self, frame: Frame, request: Request, adapter_name: str, concepts: ConceptSet) -> Tensor | None:
        context = request.find(adapter_name, concepts)
        if context is None:
            return None
        assert frame.device is not None
        frame.strengths[adapter_name] = strengths = context.to(frame.device).rows(frame.num_rows, request.call)
        if len(strengths) > 1 and not request.looked_at:
            refuse_other_orders(frame.model)
            request.looked_at = True
        return strengths

    def _enter_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cut = getattr(model, "_is_replica", False)  # a copy with copies of all layers, by DataParallel
        if not torch.compiler.is_compiling() and not cut:
            self._model = weakref.ref(model)  # a copy has another
            if not self.alive:
                check_unasked(self.request())
                self.remove(model)
                return None
        box = STATE.box
        # First of all, so that the other hook finds its frame whatever is raised below.
        box.frame = frame = Frame(self, model, box.frame)
        context, kwargs = take_context(kwargs)
        if context is not None:
            check_whole(self.elsewhere)
        if self._takes_context and "context" in kwargs:
            context = kwargs["context"]
            kwargs = {name: value for name, value in kwargs.items() if name != "context"}
        if context is not None:
            frame.request = self.make_request(context)
        else:
            frame.request = self.request()
            if frame.request is not None and torch.is_grad_enabled() and in_backward():
                raise unknown_recomputation()
        if frame.request is None and _is_exporting():
            warnings.warn(
                "The model is exported without a context, so as the base for good: what is exported keeps the context "
                "of this moment. Export inside `with intervene(model, context):`, or let a mask be one of the inputs.",
                stacklevel=2,
            )
        if frame.request is not None:
            self._check_still_valid(model, frame.request)
            if cut and frame.request.is_mixed and not isinstance(context, Tensor):
                raise UserValueError(
                    "DataParallel cuts the batch into parts, and rows with contexts of their own cannot be told apart "
                    "in them. Pass the contexts as a mask, model(..., context=mask), which it cuts alike; or use "
                    "DistributedDataParallel."
                )
            frame.device, frame.num_rows, frame.ragged, frame.tokens = input_rows(model, args, kwargs)
            if regions := frame.request.regions():
                frame.places = places(model, args, kwargs, regions)
            for name in frame.request.adapters:
                if name in self.concepts:
                    strengths = self._resolve(frame, frame.request, name, self.concepts[name])
                    if strengths is not None:
                        frame.matrices[name] = self._matrices(frame, frame.request, name, strengths)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                carry_frames_into_recomputation(model)
        return args, kwargs  # whether they changed or not: older compilers cannot trace a comparison of the two

    def _leave_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = STATE.box.frame
        if frame is not None and frame.owner is self:
            STATE.box.frame = frame.outer

    def _check_still_valid(self, model: nn.Module, request: Request) -> None:
        # Adapters may have been activated or merged since the context was set.
        if request.named is not None:
            check_active([request.named], self.layer.active_adapters)
        elif request.checked_for != tuple(self.layer.active_adapters):
            check_active(self.concepts, self.layer.active_adapters)
            if request.contexts:
                self._check_names(request.contexts, self.active_adapters())
            else:
                check_mask_is_for(self.active_adapters(), request.adapters)
        if self.merged:
            self._check_merged(request.adapters)
            apart = {name: request.adapters.get(name) for name in self.active_adapters() if name not in self.merged}
            asked = [name for name, context in apart.items() if context and context.changes_something]
            for layer in self._layers(model) if asked else ():
                if layer.merged:
                    check_not_merged_over(asked, layer.concepts, self.merged)

    def _check_merged(self, contexts: Mapping[str, AdapterContext]) -> None:
        for name, context in contexts.items():
            if (merged := self.merged.get(name)) is not None:
                check_merged_context(name, self.concepts[name], merged, context.completed)

    def _check_names(self, contexts: tuple[Context, ...], addressed: dict[str, ConceptSet]) -> None:
        others = {name: concepts for name, concepts in self.concepts.items() if name not in addressed}
        check_names(contexts, addressed, others)

    def make_request(
        self,
        context: ContextBatch,
        adapter_name: str | None = None,
        images_per_prompt: int = 1,
        guidance_copies: int = 1,
        observational: float | None = None,
    ) -> Request:
        """Check a context and encode it for the adapters it concerns.

        Where a context names concepts of other adapters only, an adapter's observational part is off.

        Raises:
            ValueError: for unknown concepts or adapters, a shared concept without `adapter_name`, wrong masks, a
                strength of the observational part where there is none, or a context that differs from the one merged
                into the weights.
        """
        for name, value in (("images_per_prompt", images_per_prompt), ("guidance_copies", guidance_copies)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserValueError(f"{name}={value!r} must be a whole number of at least 1.")
        if adapter_name is None:
            check_active(self.concepts, self.layer.active_adapters)
            addressed = self.active_adapters()
        else:
            check_known(adapter_name, self.concepts)
            addressed = {adapter_name: self.concepts[adapter_name]}
        contexts, mask = normalize(context, observational)
        if mask is not None:
            check_one_adapter_per_mask(mask, addressed)
        else:
            self._check_names(contexts, addressed)
        if observational not in (None, 1) or any(context.observational != 1 for context in contexts):
            check_observational_part(addressed, self.observational_ranks)

        def encode(concepts: ConceptSet) -> AdapterContext:
            if mask is not None:
                strengths = concepts.check_mask(mask)
                if observational is not None:
                    strengths = completed(strengths, len(concepts), observational)
                return AdapterContext(
                    concepts, strengths, len(strengths) == 1, images_per_prompt, guidance_copies, True
                )
            own = [restricted(context, concepts) for context in contexts]
            strengths, uniform = concepts.strengths(own), len(set(own)) == 1
            return AdapterContext(concepts, strengths, uniform, images_per_prompt, guidance_copies, False)

        adapters = {name: encode(concepts) for name, concepts in addressed.items()}
        self._check_merged(adapters)
        if adapter_name is not None:
            return Request(self, adapters, None, None, named=adapter_name)
        return Request(self, adapters, None, encode, contexts, tuple(self.layer.active_adapters))


def take_context(arguments: Mapping[str, Any]) -> tuple[ContextBatch | None, dict[str, Any]]:
    """Return a context inside a call's attention arguments, and the arguments without it."""
    for name in _ATTENTION_KWARGS:
        inner = arguments.get(name)
        if isinstance(inner, dict) and "context" in inner:
            rest = {key: value for key, value in inner.items() if key != "context"}
            return inner["context"], {**arguments, name: rest or None}
    return None, cast(dict, arguments)


def _is_exporting() -> bool:
    return torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch.jit.is_tracing())
