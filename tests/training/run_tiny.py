"""One training run in a process of its own, with faults on request; started by the `start` fixture.

The processes come from a fork server, which imports the libraries once for all of them.
"""

import faulthandler
import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import accelerate.checkpointing
import datasets
import diffusers
import torch
import torch.distributed as dist

from hf_causal_context.bases.families import FAMILIES
from hf_causal_context.training import finetune
from hf_causal_context.training.arguments import TextArguments, TrainingArguments
from hf_causal_context.training.language import fine_tune as language
from hf_causal_context.training.loop import checkpoints, trainer

LOADED = (diffusers.DDPMPipeline, diffusers.UNet2DModel, FAMILIES)  # diffusers imports a class when it is first used


@dataclass
class Faults:
    """What happens to a run; steps are optimizer steps, micro-batches are counted from the start of the process."""

    signal_after_step: tuple[int, int] | None = None  # (step, number of the signal), before a checkpoint is saved
    signal_in_microbatch: tuple[int, int] | None = None
    kill_while_saving: int | None = None  # the step whose optimizer is written half
    kill_at_call: tuple[str, int] | None = None  # so many calls, in C too, after this function began
    calls_file: str | None = None  # how many calls there were in `fit`, and how many of them in `save_checkpoint`
    collectives_file: str | None = None  # one line for each all-reduce that the loop asks for; steps then seem quick
    no_memory_to_generate: bool = False
    fail_first: bool = False  # where the main process prepares what the others read
    seen_file: str | None = None  # one line for each micro-batch: digests of its images
    ready_file: str | None = None  # written after step 1; every step then takes a while


@dataclass
class Place:
    """Of one of several processes."""

    rank: int
    world_size: int
    rendezvous: str


def main(outcome: str, cache: str, settings: dict, faults: Faults, place: Place | None) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a hang shows where
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data loaders, as on Linux; the fork server sets its own
    os.setpgrp()
    # Of several processes, Accelerate sets the threads of each anew, where this does not tell it otherwise.
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    datasets.config.HF_DATASETS_CACHE = cache
    if place is not None:
        _join(place)
    _install(faults)
    try:
        if "max_new_tokens" in settings:
            message = str(language.train_text(TextArguments(**settings)))
        else:
            message = str(finetune.train(TrainingArguments(**settings)))
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    Path(outcome).write_text(message)
    if place is not None and dist.is_initialized():  # else the end of the training did it
        dist.destroy_process_group()


def _join(place: Place) -> None:
    ranks = {"RANK": place.rank, "LOCAL_RANK": place.rank, "WORLD_SIZE": place.world_size}
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # Accelerate asks for them; the file is what is used
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place.rendezvous}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=60),
    )


def _install(faults: Faults) -> None:
    def raise_signal(number: int) -> None:
        os.kill(os.getpid(), number)

    make_objective, save = finetune.denoising_objective, accelerate.checkpointing.save
    train_step = trainer.Run.train_step
    if faults.kill_at_call:
        where, number = faults.kill_at_call
        module = checkpoints if where == "remove_checkpoint" else trainer
        begin = getattr(module, where)

        def kill_later(*args):
            if sys.getprofile() is None:
                left = itertools.count(number - 1, -1)
                sys.setprofile(lambda frame, event, arg: None if next(left) else raise_signal(signal.SIGKILL))
            return begin(*args)

        setattr(module, where, kill_later)
    if faults.calls_file:
        _count_calls(faults.calls_file)
    if faults.collectives_file:
        _note_collectives(faults.collectives_file)
    if faults.no_memory_to_generate:
        before_the_first_step = [finetune.generate]

        def out_of_memory(*args, **kwargs):
            if before_the_first_step:
                return before_the_first_step.pop()(*args, **kwargs)
            raise torch.OutOfMemoryError("CUDA out of memory")

        finetune.generate = out_of_memory
    if faults.fail_first:

        def fail(*args):
            raise RuntimeError("no batches")

        finetune.DenoiserBatches = fail

    def train_step_with_faults(self):
        train_step(self)
        if faults.signal_after_step and self.done == faults.signal_after_step[0]:
            raise_signal(faults.signal_after_step[1])
        if faults.ready_file:
            Path(faults.ready_file).touch()
            time.sleep(0.05)

    def objective_with_faults(*args):
        objective, numbers = make_objective(*args), itertools.count(1)

        def call(model, batch):
            if faults.seen_file:
                digests = [hashlib.blake2b(row.numpy().tobytes(), digest_size=6).hexdigest() for row in batch.clean]
                with open(faults.seen_file, "a") as file:
                    file.write(" ".join(digests) + "\n")
            if faults.signal_in_microbatch and next(numbers) == faults.signal_in_microbatch[0]:
                raise_signal(faults.signal_in_microbatch[1])
            return objective(model, batch)

        return call

    def save_half(state, path, **kwargs):
        if Path(path).name != "optimizer.bin" or f"checkpoint-{faults.kill_while_saving}." not in str(path):
            return save(state, path, **kwargs)
        whole = io.BytesIO()
        torch.save(state, whole)
        Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        return os.kill(os.getpid(), signal.SIGKILL)

    trainer.Run.train_step = train_step_with_faults
    finetune.denoising_objective = objective_with_faults
    accelerate.checkpointing.save = save_half


def _count_calls(path: str) -> None:
    calls, in_saving = itertools.count(), []
    watched, save_checkpoint = trainer.watched_processes, trainer.save_checkpoint

    @contextmanager
    def counted(*args):  # around all of `fit`
        sys.setprofile(lambda frame, event, arg: next(calls) and None)
        with watched(*args):
            yield
        sys.setprofile(None)
        Path(path).write_text(f"{next(calls)} {sum(in_saving)}")

    def counted_save(*args):
        before = next(calls)
        save_checkpoint(*args)
        in_saving.append(next(calls) - before)

    trainer.watched_processes, trainer.save_checkpoint = counted, counted_save


def _note_collectives(path: str) -> None:
    all_reduce = dist.all_reduce  # that of gradients is called in C++

    def noted(*args, **kwargs):
        with open(path, "a") as file:
            file.write(f"{args[0].numel()}\n")
        return all_reduce(*args, **kwargs)

    dist.all_reduce = noted
    trainer.perf_counter = itertools.count(0.0, 1e-3).__next__
