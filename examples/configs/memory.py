"""What a run takes on a GPU: memory and arithmetic, from a step of the trainer with tensors that have no values."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers.models.transformers.transformer_hidream_image import MoEGate
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, register_flop_formula

from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.bases.loading import as_base
from hf_causal_context.bases.token_batches import TextBatch
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.data import InterventionalData
from hf_causal_context.training.arguments import NOISE_EXPERTS, AdapterArguments, TextArguments, TrainingArguments
from hf_causal_context.training.denoiser.objectives import Batch, denoising_objective
from hf_causal_context.training.dry_run import AliveBytes, memory_of_step
from hf_causal_context.training.language.objective import LanguageModelingObjective
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.loop.trainer import Run
from hf_causal_context.training.noise import Draws
from hf_causal_context.training.recipe import DTYPES, attach_adapter

from .parts import LanguageShape, Shape, ones

CONCEPTS = ("first", "second", "third", "fourth")
# Numbers of a tensor that keeps its values, such as the mask of a caption, on which shapes of others depend.
SMALL = 100_000


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * 2 * math.prod(query) * key[-2]  # two products; PyTorch counts those on GPUs only


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward(gradient: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    return 5 * 2 * math.prod(query) * key[-2]  # one of the two again


class Allocations(TorchDispatchMode):
    """Counts all tensors that are alive within the body, those given first among them, and the arithmetic there.

    PyTorch's own counter of arithmetic keeps tensors alive.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.bytes = AliveBytes()
        self.flops = 0
        self._count(tensors)

    def _count(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self.bytes.add(value.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(tree_leaves(result))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """Within the body, layers normalize in float32, as under autocast on a GPU and not on a CPU."""
    layer_norm, group_norm = _in_single(F.layer_norm), _in_single(F.group_norm)
    with mock.patch.object(F, "layer_norm", layer_norm), mock.patch.object(F, "group_norm", group_norm):
        yield


def _in_single(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*tree_map(_single, args), **tree_map(_single, kwargs))


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


class _Unpacked(torch.autograd.Function):
    """A linear layer whose weight is unpacked in each pass, as that of bitsandbytes: it is not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None, None, None


def bits(quantization: str) -> float:
    """Bits per weight: four and the scales of 64 weights, in eight bits and once more scaled; or eight."""
    return {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "llm_int8": 8}[quantization]


def linear_weights(module: nn.Module) -> dict[nn.Linear, Tensor]:
    """Weights that quantization makes smaller: of all linear layers, except those that libraries leave as they are."""
    kept = {"lm_head", *(getattr(module, "_keep_in_fp32_modules", None) or ())}
    return {
        layer: layer.weight
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and not kept & set(name.split("."))
    }


def give_storage(module: nn.Module, dtype: torch.dtype, quantization: str | None) -> None:
    """Replace tensors of the meta device by ones that count as memory; frozen linear weights by packed ones."""
    packed = {} if quantization is None else linear_weights(module)
    known: dict[int, nn.Parameter] = {}  # tied weights are one
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if quantization and name == "weight" and isinstance(layer, nn.Linear) and layer in packed:
                size = math.ceil(parameter.numel() * bits(quantization) / 8)
                given = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
                layer.forward = _unpacking(layer, given, parameter.shape, dtype)
            else:
                given = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            layer._parameters[name] = known.setdefault(id(parameter), given)


def _unpacking(layer: nn.Linear, packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Any:
    return lambda x: _Unpacked.apply(x.to(dtype), packed, shape, layer.bias)


@contextmanager
def no_values() -> Iterator[None]:
    """Within the body, tensors have no values, except small ones that are written out."""
    small = mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", SMALL)
    even = mock.patch.object(MoEGate, "forward", _even_gate(MoEGate.forward))
    # Else transformers makes masks that it would not make of values.
    traced = mock.patch("transformers.masking_utils.is_tracing", return_value=False)
    with small, even, traced, FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _even_gate(gate: Callable[..., Any]) -> Callable[..., Any]:
    """The gate of HiDream's experts: which expert has which tokens is no value there, so all have as many."""

    def forward(self: Any, x: Tensor) -> Any:
        with mock.patch.object(self, "alpha", 0.0):  # a loss that diffusers leaves out
            indices, weights, loss = gate(self, x)
        even = np.arange(indices.numel()).reshape(indices.shape) % self.n_routed_experts
        return torch.tensor(even), weights, loss

    return forward


def peaks(shape: Shape, settings: Mapping[str, Any]) -> dict[str, float]:
    """Bytes at the peak before the first step, and in a step, of which some are told apart; and TFLOP of a batch."""
    one_batch = {"gradient_accumulation_steps": 1, "pretrained_model_name_or_path": shape.name, "output_dir": "unused"}
    with mock.patch("hf_causal_context.training.arguments.check_quantization"):  # which needs a GPU
        arguments = TrainingArguments(**{**settings, **one_batch})
    dtype, quantization = DTYPES[arguments.mixed_precision or "no"], arguments.quantization
    pipe = shape.pipeline(dtype)
    base = as_base(pipe)
    if arguments.noise_expert is not None:
        base.use_denoiser(NOISE_EXPERTS[arguments.noise_expert])
    model = attach_adapter(base.denoiser, _data(), arguments)
    if arguments.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    objective = denoising_objective(base)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    with no_values():
        for name, part in parts.items():
            small = "CLIP" in type(part).__name__ or name == "vae"
            give_storage(part, dtype, None if small else quantization)
        before, size = _preparation(base, parts, arguments)
        rows = arguments.train_batch_size

        def batch() -> Batch:
            conditions = shape.conditions(rows, dtype)
            return Batch(torch.empty(rows, *size), ones(rows, len(CONCEPTS)), conditions, Draws(0, range(rows)))

        memory = _step(model, objective, batch, arguments)
    # In later steps these are there from the beginning on: gradients of earlier batches.
    memory["step"] += memory["its gradients"] if settings.get("gradient_accumulation_steps", 1) > 1 else 0
    return {"before": before, **memory}


def language_peaks(shape: LanguageShape, settings: Mapping[str, Any]) -> dict[str, float]:
    """The same of a step of a language model, of texts of so many tokens."""
    arguments = TextArguments(**{**settings, "pretrained_model_name_or_path": shape.name, "output_dir": "unused"})
    dtype, rows = DTYPES[arguments.mixed_precision or "no"], arguments.train_batch_size
    base = shape.model(dtype)
    model = attach_adapter(base, _data(), arguments, "CAUSAL_LM")
    if arguments.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with no_values():
        give_storage(base, dtype, arguments.quantization)

        def batch() -> TextBatch:
            ids = torch.zeros(rows, shape.tokens, dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": ones(rows, shape.tokens).long()}
            return TextBatch(inputs, ids, ones(rows, len(CONCEPTS)))

        return _step(model, LanguageModelingObjective(shape.tokens), batch, arguments)


def _data() -> InterventionalData:
    rows = {"": 1, **dict.fromkeys(CONCEPTS, 1)}
    return InterventionalData(Dataset.from_dict({"context": list(rows)}), ConceptSet(CONCEPTS), tuple(rows), {}, rows)


def _step(model: Any, objective: Any, batch: Callable[[], Any], arguments: AdapterArguments) -> dict[str, float]:
    """Bytes at the peak of a step of one batch, and by part; and its arithmetic."""
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        accelerator = make_accelerator(arguments)
    accelerator.device_placement = False  # they are where they belong
    run = Run(accelerator, model, objective, arguments, num_steps=1)
    run.stream = iter(batch, None)
    run.wrapped.train()
    with Allocations([*model.parameters(), *model.buffers()]) as step, gpu_autocast():
        memory = memory_of_step(run, {"base": model})
    # In later steps the optimizer's state is there from the beginning on.
    peak = step.bytes.peak + memory[f"optimizer ({arguments.optimizer})"]
    return {"step": peak, **memory, "TFLOP": step.flops / 1e12}


def _preparation(
    base: DiffusionBase, parts: dict[str, nn.Module], arguments: TrainingArguments
) -> tuple[int, torch.Size]:
    """Bytes at the peak before the first step, when all is on the device and a row is encoded; and its size then."""
    tensors = [tensor for part in parts.values() for tensor in (*part.parameters(), *part.buffers())]
    side = arguments.resolution or base.default_resolution
    clip = (arguments.num_frames or base.default_frames,) if base.is_video else ()
    with Allocations(tensors) as allocations:
        latents = base.encode_images(torch.empty(1, 3, *clip, side, side))
    return allocations.bytes.peak, latents.shape[1:]
