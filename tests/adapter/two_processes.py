"""One of two processes that train an adapter together: python -m tests.adapter.two_processes RANK FOLDER."""

import faulthandler
import os
import sys
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_causal_context import intervene
from hf_causal_context.adapter.lookup import adapted_layers
from hf_causal_context.training.loop.sharding import shard_base

from .small import MIXED, adapted, inputs


def gradients(model: nn.Module, owner: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """Of two steps on this process's half of the batch, contexts once as masks and once as names."""
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, -0.5, 2], [1, 1, 0]])
    half = slice(2 * rank, 2 * rank + 2)
    model(inputs()[half], context=mask[half]).square().mean().backward()
    with intervene(model, MIXED[half]):
        model(inputs()[half]).square().mean().backward()
    found = {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def main(rank: int, folder: str) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a hang shows where
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    whole = DistributedDataParallel(adapted(mechanism="reduced").train())
    save_file(gradients(whole, whole.module, rank), f"{folder}/whole-{rank}.safetensors")
    sharded = adapted(mechanism="reduced").train()
    mesh = init_device_mesh("cpu", (2,))
    for layer in adapted_layers(sharded).values():
        fully_shard(cast(nn.Module, layer), mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    save_file(gradients(sharded, sharded, rank), f"{folder}/sharded-{rank}.safetensors")
    on_pieces = adapted(mechanism="reduced").train()
    on_pieces.get_base_model()._no_split_modules = ["Linear"]
    frozen = sum(p.numel() for p in on_pieces.parameters() if not p.requires_grad)
    shard_base(on_pieces, torch.device("cpu"))
    held = sum(p.to_local().numel() for p in on_pieces.parameters() if isinstance(p, DTensor))
    assert 0.4 * frozen < held < 0.6 * frozen
    on_pieces = DistributedDataParallel(on_pieces)
    save_file(gradients(on_pieces, on_pieces.module, rank), f"{folder}/on_pieces-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    # Once, a process that had passed the barrier and was done hung in the interpreter's exit, on threads not ours.
    os._exit(0)
