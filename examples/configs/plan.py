"""Writes the settings files of this folder, each with the memory that a run with it takes, computed from shapes.

    python -m examples.configs.plan

Neither weights nor a GPU are needed: a step of the training is taken with tensors that have shapes and no values.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.bases.loading import as_base
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.data import InterventionalData
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.objectives import Batch, denoising_objective
from hf_causal_context.training.dry_run import AliveBytes, memory_of_step
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.loop.trainer import Run
from hf_causal_context.training.noise import Draws
from hf_causal_context.training.recipe import DTYPES, attach_adapter

from .shapes import SHAPES, Shape, linear_weights

FOLDER = Path(__file__).parent
CONCEPTS = ("first", "second", "third", "fourth")
COMMON: dict[str, Any] = {"mixed_precision": "bf16", "learning_rate": 1e-4, "max_train_steps": 4000}
FRUGAL: dict[str, Any] = {"train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}
ROOMY: dict[str, Any] = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}

# Base -> GB of the GPU -> what differs.
SIZES: dict[str, dict[int, dict[str, Any]]] = {
    "sd15": {12: {"resolution": 512, "train_batch_size": 6}, 24: {"resolution": 512, "train_batch_size": 16}},
    "sdxl": {
        12: {"resolution": 1024, **FRUGAL},
        24: {"resolution": 1024, **ROOMY, "train_batch_size": 8},
    },
    "flux1-dev": {
        12: {"resolution": 512, "quantization": "nf4", **FRUGAL},
        16: {"resolution": 1024, "quantization": "nf4", **FRUGAL},
        24: {"resolution": 1024, "quantization": "llm_int8", **FRUGAL},
        48: {"resolution": 1024, **ROOMY},
    },
    "qwen-image": {
        24: {"resolution": 1024, "quantization": "nf4", **FRUGAL},
        48: {"resolution": 1024, "quantization": "llm_int8", **ROOMY},
        80: {"resolution": 1024, **ROOMY},
    },
    "z-image": {
        12: {"resolution": 1024, "quantization": "nf4", **FRUGAL},
        16: {"resolution": 1024, "quantization": "llm_int8", **FRUGAL},
        24: {"resolution": 1024, **FRUGAL},
    },
}


class Allocations(TorchDispatchMode):
    """Counts all tensors that are alive within the body, those given first among them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.bytes = AliveBytes()
        self._count(tensors)

    def _count(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self.bytes.add(value.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(tree_leaves(result))
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


def give_storage(module: nn.Module, dtype: torch.dtype, quantization: str | None) -> None:
    """Replace tensors of the meta device by ones that count as memory; frozen linear weights by packed ones."""
    packed = {} if quantization is None else linear_weights(module)
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if quantization and name == "weight" and isinstance(layer, nn.Linear) and layer in packed:
                size = math.ceil(parameter.numel() * bits(quantization) / 8)
                given = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
                layer.forward = _unpacking(layer, given, parameter.shape, dtype)
            else:
                given = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
            layer._parameters[name] = given


def _unpacking(layer: nn.Linear, packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Any:
    return lambda x: _Unpacked.apply(x.to(dtype), packed, shape, layer.bias)


@contextmanager
def no_values() -> Iterator[None]:
    """Within the body, tensors have no values, so what looks at them is left out."""
    unchecked = mock.patch.object(ConceptSet, "check_mask", lambda self, mask: mask)
    with unchecked, FakeTensorMode(allow_non_fake_inputs=True):
        yield


def peaks(shape: Shape, settings: dict[str, Any]) -> dict[str, int]:
    """Bytes at the peak before the first step, and in a step, of which some are told apart."""
    one_batch = {"gradient_accumulation_steps": 1, "pretrained_model_name_or_path": shape.name, "output_dir": "unused"}
    with mock.patch("hf_causal_context.training.arguments.check_quantization"):  # which needs a GPU
        arguments = TrainingArguments(**{**settings, **one_batch})
    dtype, quantization = DTYPES[arguments.mixed_precision or "no"], arguments.quantization
    pipe = shape.pipeline(dtype)
    base = as_base(pipe)
    rows = {"": 1, **dict.fromkeys(CONCEPTS, 1)}
    data = InterventionalData(Dataset.from_dict({"context": list(rows)}), ConceptSet(CONCEPTS), tuple(rows), {}, rows)
    model = attach_adapter(base.denoiser, data, arguments)
    if arguments.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    objective = denoising_objective(base)
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        accelerator = make_accelerator(arguments)
    accelerator.device_placement = False  # they are where they belong
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    with no_values():
        for name, part in parts.items():
            small = "CLIP" in type(part).__name__ or name == "vae"
            give_storage(part, dtype, None if small else quantization)
        before = _preparation(base, parts, arguments.resolution)
        run = Run(accelerator, model, objective, arguments, num_steps=1)
        run.stream = _batches(base, shape, arguments, dtype)
        run.wrapped.train()
        with Allocations([*model.parameters()]) as step, gpu_autocast():
            memory = memory_of_step(run, {"base": model})
    # In later steps these are there from the beginning on: the optimizer's state, and gradients of earlier batches.
    later = memory[f"optimizer ({arguments.optimizer})"]
    later += memory["its gradients"] if settings.get("gradient_accumulation_steps", 1) > 1 else 0
    return {"before": before, "step": step.bytes.peak + later, **memory}


def _preparation(base: DiffusionBase, parts: dict[str, nn.Module], resolution: int | None) -> int:
    """Bytes at the peak before the first step: all parts are on the device, and an image is encoded."""
    tensors: list[Tensor] = [tensor for part in parts.values() for tensor in part.parameters()]
    side = resolution or base.default_resolution
    with Allocations(tensors) as allocations:
        base.encode_images(torch.empty(1, 3, side, side))
    return allocations.bytes.peak


def _batches(base: DiffusionBase, shape: Shape, arguments: TrainingArguments, dtype: torch.dtype) -> Iterator[Batch]:
    rows, side = arguments.train_batch_size, (arguments.resolution or base.default_resolution) // base._vae_scale
    while True:
        clean = torch.empty(rows, shape.latent_channels, side, side)
        context = torch.ones(rows, len(CONCEPTS))
        yield Batch(clean, context, shape.conditions(rows, dtype), Draws(0, range(rows)))


def text(base: str, size: int) -> str:
    """The content of that file."""
    shape, settings = SHAPES[base], COMMON | SIZES[base][size]
    memory = {name: f"{number / 1e9:.1f}" for name, number in peaks(shape, settings).items()}
    peak = max(memory["before"], memory["step"], key=float)
    return (
        f"# {shape.title} on a GPU of {size} GB. Peak memory, computed from shapes by plan.py: {peak} GB.\n"
        f"# Before the first step {memory['before']} GB; in a step {memory['step']} GB, of which base "
        f"{memory['base']} GB and\n# kept for the backward pass {memory['kept for the backward pass']} GB. What "
        "kernels need besides comes on top.\n#\n"
        f"#   hf-causal-context train --config {file_name(base, size)} --train_data_dir my-images --output_dir "
        "my-adapter\n" + yaml.safe_dump({"pretrained_model_name_or_path": shape.name, **settings}, sort_keys=False)
    )


def file_name(base: str, size: int) -> str:
    """The settings file of a base for a GPU of a size, in GB."""
    return f"{base}-{size}gb.yaml"


def main() -> None:
    """Write the files, or those of the bases that are named."""
    parser = argparse.ArgumentParser(description="Write the settings files of this folder.")
    parser.add_argument("bases", nargs="*", default=[*SIZES], help=", ".join(SIZES))
    for base in parser.parse_args().bases:
        for size in SIZES[base]:
            FOLDER.joinpath(file_name(base, size)).write_text(text(base, size), encoding="utf-8")


if __name__ == "__main__":
    main()
