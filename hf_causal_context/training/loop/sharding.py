"""A frozen base that is cut into one piece per process, for bases that are too large for one device.

FSDP2's `fully_shard` gathers a block's weights when the block runs. The adapter stays whole in every process: it is
small, and so its gradients, optimizer, average and checkpoints are those of a run that is not sharded.
"""

from __future__ import annotations

import os
from typing import cast

import torch
import torch.distributed as dist
from accelerate.utils.environment import parse_flag_from_env
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ...errors import UserValueError
from ..optimization_arguments import OptimizationArguments

_OTHERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}


def check_configuration(arguments: OptimizationArguments) -> None:
    """Refuse Accelerate's own ways to shard: they would cut, and save, the adapter together with its base.

    Raises:
        ValueError: with what to configure instead.
    """
    offered = hasattr(arguments, "shard_base")
    for variable, name in _OTHERS.items():
        if parse_flag_from_env(variable):
            raise UserValueError(
                f"Accelerate is configured to use {name} ({variable}={os.environ[variable]}), which is not supported. "
                "Configure plain data parallelism (accelerate config, or accelerate launch --multi_gpu)"
                + (", and pass --shard_base, which cuts the frozen base into pieces." if offered else ".")
            )


def check_processes(arguments: OptimizationArguments) -> None:
    """Refuse to shard in a process that was not started as one of several.

    Raises:
        ValueError: with how to start them.
    """
    if getattr(arguments, "shard_base", False) and not dist.is_initialized():
        raise UserValueError(
            "--shard_base cuts the base into one piece per process, and this run has one process. Start several "
            "(accelerate launch --multi_gpu, or torchrun), or leave it out."
        )


def blocks(base: nn.Module) -> list[nn.Module]:
    """Return the parts that a base's class says must not be split (`_no_split_modules`), inner ones first."""
    names = set(cast("list[str] | None", getattr(base, "_no_split_modules", None)) or ())
    return [module for module in reversed(list(base.modules())) if type(module).__name__ in names]


def shard_base(model: PeftModel, device: torch.device) -> None:
    """Cut the frozen weights of `model` into one piece per process, on `device`, block by block; the rest is one more.

    Raises:
        ValueError: for a base whose class names no blocks: then each process would gather all of it at once.
    """
    base = model.get_base_model()
    found = blocks(base)
    if not found:
        raise UserValueError(
            f"--shard_base: {type(base).__name__} does not name its blocks (_no_split_modules), so every process would "
            "hold all of it whenever it runs. Leave it out."
        )
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    original = type(base)
    for module in (*found, base):
        fully_shard(module, mesh=mesh, ignored_params=cast("set[nn.Parameter]", trained))
    if hasattr(base, "generate"):  # it calls an encoder alone, outside of the base's forward
        register_fsdp_forward_method(base, "generate")
    # The subclass that `fully_shard` makes is called otherwise, and the config of the adapter names the base's class.
    type(base).__name__, type(base).__module__ = original.__name__, original.__module__
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def is_sharded(model: nn.Module) -> bool:
    """Whether calling `model` takes all processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
