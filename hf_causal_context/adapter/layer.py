"""The adapter on one module: y = base(x) + (alpha / W) Up(o z_o, c(m)) with (z_o, z) = Down(x).

z_o is the observational part, of strength o. Without any context nothing is added: that is the base, bit for bit.

Shapes: n rows, T tokens or pixels (spatial dimensions of convolutions), K concepts, W width, R = K W, N rank of the
observational part, S = N + R.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..contexts import ConceptSet
from ..errors import UserValueError
from ..functional import linear, row_linear, views_of_rows
from ..layers import CausalLayer, ExpressiveLayer, OutputLayer, RepresentationLayer
from .conditioning.hooks import Conditioning
from .conditioning.regional import in_regions
from .conditioning.request import for_mechanism
from .config import CausalContextConfig
from .lora_conversion import ConvertsToLora
from .merged_context import HoldsMergedContexts, strengths_to_merge
from .parts_by_adapter import PartsByAdapter
from .storage.load_hook import check_loaded


class CausalContextLayer(ConvertsToLora, HoldsMergedContexts, BaseTunerLayer):
    """What the adapted forms of Linear, Conv1D (GPT-2) and convolutions share."""

    adapter_layer_names = (
        "causal_context_down",
        "causal_context_expressive",
        "causal_context_causal",
        "causal_context_up",
    )
    other_param_names = ("r", "scaling", "concepts", "merged_strengths", "merged_scaling", "set_aside")
    cast_input_dtype_enabled = True  # PEFT and diffusers switch it off around forwards

    base_layer: nn.Module
    training: bool  # of nn.Module, which the concrete classes inherit

    def __init__(self, base_layer: nn.Module, conditioning: Conditioning | None) -> None:
        self.base_layer = base_layer
        self.causal_context_down = nn.ModuleDict()
        self.causal_context_expressive = nn.ModuleDict()
        self.causal_context_causal = nn.ModuleDict()
        self.causal_context_up = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.concepts: dict[str, ConceptSet] = {}
        self.merged_strengths: dict[str, Tensor] = {}
        self.merged_scaling: dict[str, float] = {}  # which may have been set anew since
        self.set_aside: dict[str, Tensor] = {}
        self._default_scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.conditioning = conditioning or Conditioning(self)
        self.name = ""  # path in the base model, for error messages and to tell vision towers and experts
        self.in_features, self.out_features, self._kernel_size = geometry(self.get_base_layer())
        cast(nn.Module, self).register_load_state_dict_pre_hook(check_loaded)

    def update_layer(self, adapter_name: str, config: CausalContextConfig, current_key: str) -> None:
        """Add an adapter to this layer."""
        self.name = current_key
        concepts = ConceptSet(config.concepts)
        width, part = config.rank_at(current_key), cast(int, config.observational_rank)
        self.concepts[adapter_name] = self.conditioning.concepts[adapter_name] = concepts
        self.conditioning.observational_ranks[adapter_name] = part
        self.conditioning.calibrations[adapter_name] = config.knots()
        self.r[adapter_name] = rank = part + len(concepts) * width
        self.scaling[adapter_name] = self._default_scaling[adapter_name] = (config.alpha or width) / width
        down = RepresentationLayer(self.in_features, rank, self._kernel_size, config.dropout)
        self.causal_context_down[adapter_name] = down
        if config.expressive_depth:
            self.causal_context_expressive[adapter_name] = ExpressiveLayer(
                len(concepts), width, config.expressive_depth, config.init_weights
            )
        self.causal_context_causal[adapter_name] = config.causal_layer(width)
        self.causal_context_up[adapter_name] = OutputLayer(rank, self.out_features, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def lora_A(self) -> PartsByAdapter:  # noqa: N802
        """The adapters under the name by which diffusers' `set_lora_device` moves them."""
        return PartsByAdapter([getattr(self, name) for name in self.adapter_layer_names])

    lora_B = lora_A  # noqa: N815

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off this layer; whoever does so does it on all of them."""
        super().delete_adapter(adapter_name)
        of = self.conditioning
        for known in (of.concepts, of.observational_ranks, of.calibrations, of.merged, of.elsewhere):
            known.pop(adapter_name, None)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        # Eight bits are how a base is stored, not what it computes in.
        return device, None if dtype is not None and dtype.itemsize == 1 else dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base module's output, plus what the active adapters add."""
        if self.disable_adapters and self.merged:
            self.take_out()
        x = args[0] if args else next(iter(kwargs.values()))  # some models call Linear(input=x)
        if args and torch.compiler.is_compiling() and not self._kernel_size:
            of_base, x = views_of_rows(x)
            args = of_base, *args[1:]
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.causal_context_down:
                result = self._add_adapter_output(result, x, name)
        return result.to(dtype)

    def _add_adapter_output(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        batched = x.ndim > len(self._kernel_size) + 1
        strengths = self.conditioning.strengths_for(self, adapter_name, x, x.shape[0] if batched else 1)
        if strengths is None:  # no context, at inference
            return result
        if not batched:
            x, result = x[None], result[None]
        down = cast(RepresentationLayer, self.causal_context_down[adapter_name])
        up = cast(OutputLayer, self.causal_context_up[adapter_name])
        # Not PEFT's cast, which diffusers switches off where it casts weights itself: never these.
        x = x.to(down.weight.dtype)
        z = down(x, self._down)
        if adapter_name in self.causal_context_expressive:
            z = self.causal_context_expressive[adapter_name](z)
        matrix = self.conditioning.causal_matrix(self, adapter_name, len(z))
        if matrix is None:
            c = self.causal(adapter_name)(z, self.conditioning.repeated(strengths, adapter_name, z))
        else:
            c = row_linear(z, matrix.to(z.dtype))  # a part of a model may switch autocast off
        c = c if (scaling := self.scaling[adapter_name]) == 1 else c * scaling
        result = up(in_regions(self, adapter_name, z, c), partial(self._add, result))
        return result if batched else result[0]

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        """(n, T, in) -> (n, T, S), or for convolutions (n, in, *T) -> (n, *T, S)."""
        raise NotImplementedError

    def _add(self, result: Tensor, c: Tensor, weight: Tensor) -> Tensor:
        """The base's output (n, T, out) plus Up of (n, T, S), or (n, out, *T) plus that of (n, *T, S)."""
        raise NotImplementedError

    def causal(self, adapter_name: str) -> CausalLayer:
        """Return the causal layer of an adapter."""
        return cast(CausalLayer, self.causal_context_causal[adapter_name])

    def matrix(self, adapter_name: str, strengths: Tensor) -> Tensor:
        """Return the (S, S) matrix between Down and Up for one context: strengths (1, 1 + K), or a mask (1, K)."""
        causal = self.causal(adapter_name)
        return causal.matrix(for_mechanism(strengths, causal.num_concepts, causal.observational_rank))

    def merge_refusal(self, adapter_name: str) -> str | None:
        """Why an adapter cannot become a change of this layer's weight; None if it can."""
        if adapter_name in self.causal_context_expressive:
            return "its mechanism is not linear (expressive_depth > 0)"
        return None

    def lora_weights(self, adapter_name: str, strengths: Tensor, scaling: float | None = None) -> tuple[Tensor, Tensor]:
        """lora_A (S, in, *kernel) and lora_B (out, S), with the scale in B, for one context; float32.

        Args:
            adapter_name: one on this layer.
            strengths: (1, 1 + K), see `ConceptSet.strengths`; or a mask (1, K), with the observational part at 1.
            scaling: in place of the present one.

        Raises:
            ValueError: for a mechanism that is not linear.
        """
        refusal = self.merge_refusal(adapter_name)
        if refusal:
            raise UserValueError(f"Adapter {adapter_name!r} cannot be baked or merged: {refusal}.")
        with torch.no_grad():
            down, up = (weight.float() for weight in self.weights(adapter_name))
            mixing = self.matrix(adapter_name, strengths.to(down)).float()
            scaling = self.scaling[adapter_name] if scaling is None else scaling
            return (mixing @ down.flatten(1)).view_as(down), up * scaling

    def get_delta_weight(
        self, adapter_name: str, strengths: Tensor | None = None, scaling: float | None = None
    ) -> Tensor:
        """Return the change of the base weight for one context, in the base weight's shape and dtype.

        Args:
            adapter_name: one on this layer.
            strengths: as of `lora_weights`; None takes the context that is set.
            scaling: as of `lora_weights`.
        """
        strengths = self.active_strengths(adapter_name) if strengths is None else strengths
        a, b = self.lora_weights(adapter_name, strengths, scaling)
        return self._as_base_weight((b @ a.flatten(1)).view(-1, *a.shape[1:]))

    def _as_base_weight(self, delta: Tensor) -> Tensor:
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active context's change to the base weight; the context is kept for `unmerge`.

        The context is that of the enclosing `intervene`. Without one, adapters that are named are merged for the
        observational context, and others are not merged: without a context they add nothing.

        Raises:
            ValueError: for a mechanism, module or weight that cannot be merged, several contexts, or (with
                `safe_merge`) a result that is not finite.
        """
        if adapter_names is None and self.conditioning.request() is None and not self.training:
            warnings.warn(
                "Without a context causal context adapters add nothing, so they were not merged (or fused): they act "
                "on top of what was. Merge inside `with intervene(model_or_pipeline, context):` to merge them, too.",
                stacklevel=2,
            )
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.causal_context_down:
                self.merge_strengths(name, strengths_to_merge(self.conditioning, name, self.training), safe_merge)

    def conditioning_of_model(self) -> Conditioning:
        return self.conditioning

    def merged_weight(self, adapter_name: str, strengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = self._mergeable_weight(adapter_name)
        self.merged_scaling[adapter_name] = self.scaling[adapter_name]
        merged = weight.data + self.get_delta_weight(adapter_name, strengths).to(weight)
        return weight, merged, merged

    def unmerge(self) -> None:
        """Take the merged changes out of the base weight again."""
        self.set_aside = {}
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.causal_context_down:
                weight = self._mergeable_weight(name)
                strengths, scaling = self.merged_strengths.pop(name), self.merged_scaling.pop(name)
                self.conditioning.merged.pop(name, None)
                weight.data = weight.data - self.get_delta_weight(name, strengths, scaling).to(weight)

    def _mergeable_weight(self, adapter_name: str) -> nn.Parameter:
        weight = self.get_base_layer().weight
        refusal = self.merge_refusal(adapter_name)
        plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()
        if not plain or weight.dtype.itemsize == 1:
            refusal = f"its base weight is quantized or sharded ({type(weight.data).__name__}, {weight.dtype})"
        if refusal:
            raise UserValueError(
                f"Adapter {adapter_name!r} cannot be merged into a {type(self.get_base_layer()).__name__}: {refusal}. "
                "Keep it as an adapter."
            )
        return cast(nn.Parameter, weight)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter's output relative to its default (as diffusers does for LoRA)."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._default_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters; None restores the default."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.scaling[name] / scale if scale else self._default_scaling[name]

    def __repr__(self) -> str:
        return "causal_context." + super().__repr__()


class _LinearForm(CausalContextLayer):
    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)

    def _add(self, result: Tensor, c: Tensor, weight: Tensor) -> Tensor:
        if result.dtype != c.dtype or not result.is_contiguous():
            return result + linear(c, weight)
        # One operation instead of two.
        return torch.addmm(result.flatten(0, -2), c.flatten(0, -2), weight.T).view(result.shape)


class Linear(nn.Module, _LinearForm):
    """On nn.Linear."""

    def __init__(self, base_layer: nn.Module, conditioning: Conditioning | None) -> None:
        super().__init__()
        CausalContextLayer.__init__(self, base_layer, conditioning)

    forward = CausalContextLayer.forward


class TransposedLinear(nn.Module, _LinearForm):
    """On transformers' Conv1D (GPT-2), which stores its weight as (in, out)."""

    def __init__(self, base_layer: nn.Module, conditioning: Conditioning | None) -> None:
        super().__init__()
        CausalContextLayer.__init__(self, base_layer, conditioning)

    forward = CausalContextLayer.forward

    def _as_base_weight(self, delta: Tensor) -> Tensor:
        return delta.T


class ConvNd(nn.Module, CausalContextLayer):
    """On Conv1d, Conv2d and Conv3d, whatever kernel, stride, padding and dilation.

    Down is a convolution like the base's over all input channels, Up is a 1x1 convolution. On a grouped convolution the
    adapter therefore mixes groups; it works, but cannot be merged.
    """

    def __init__(self, base_layer: nn.Module, conditioning: Conditioning | None) -> None:
        super().__init__()
        CausalContextLayer.__init__(self, base_layer, conditioning)
        self._convolve = getattr(nn.functional, f"conv{len(self._kernel_size)}d")

    forward = CausalContextLayer.forward

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        base = cast(nn.Conv2d, self.get_base_layer())
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        return self._convolve(x, weight, None, base.stride, padding, base.dilation).movedim(1, -1)

    def _add(self, result: Tensor, c: Tensor, weight: Tensor) -> Tensor:
        return result + self._convolve(c.movedim(-1, 1), weight[(..., *(None,) * len(self._kernel_size))])

    def merge_refusal(self, adapter_name: str) -> str | None:
        groups = cast(nn.Conv2d, self.get_base_layer()).groups
        if groups > 1:
            return f"the convolution has {groups} groups, and the adapter connects all channels"
        return super().merge_refusal(adapter_name)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return a module as it is without adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def adapted_class(module: nn.Module) -> type[Linear] | type[TransposedLinear] | type[ConvNd] | None:
    """Return the form of the adapter for a module, None if there is none."""
    module = unwrapped(module)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # nn.MultiheadAttention uses its weight without calling it
    if isinstance(module, nn.Linear):
        return Linear
    if isinstance(module, Conv1D):
        return TransposedLinear
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvNd
    return None


def geometry(base: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Input features, output features and kernel of a module that can be adapted."""
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return base.in_channels, base.out_channels, tuple(base.kernel_size)
    if isinstance(base, Conv1D):
        return *cast(tuple[int, int], tuple(base.weight.shape)), ()
    assert isinstance(base, nn.Linear)
    return base.in_features, base.out_features, ()
