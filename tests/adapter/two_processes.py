"""One of two processes that train an adapter together: python -m tests.adapter.two_processes RANK FOLDER."""

import faulthandler
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from hf_causal_context import intervene

from .small import MIXED, adapted, inputs


def main(rank: int, folder: str) -> None:
    faulthandler.dump_traceback_later(100, exit=True)  # a hang shows where
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = DistributedDataParallel(adapted(mechanism="reduced").train())
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, -0.5, 2], [1, 1, 0]])
    half = slice(2 * rank, 2 * rank + 2)
    model(inputs()[half], context=mask[half]).square().mean().backward()
    with intervene(model, MIXED[half]):
        model(inputs()[half]).square().mean().backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    save_file(gradients, f"{folder}/{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    # Once, a process that had passed the barrier and was done hung in the interpreter's exit, on threads not ours.
    os._exit(0)
