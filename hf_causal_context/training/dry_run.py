"""What a run will take, before it begins: shapes, rows, memory by part, and time from a few measured steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import timedelta
from statistics import fmean
from time import perf_counter
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from .loop.hooks import StepHooks
from .loop.trainer import Run
from .optimization_arguments import OptimizationArguments

MEASURED_STEPS = 3  # after one that warms up
MEASURED_ROWS = 8  # at least: with pairs, one row in so many is edited, and takes much longer


def num_taken(arguments: OptimizationArguments) -> int:
    """Return how many steps a dry run takes."""
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return 1 + max(MEASURED_STEPS, -(-MEASURED_ROWS // rows))


def dry_run(run: Run, stream: Iterator[Any], parts: Mapping[str, nn.Module], idle: tuple[str, ...]) -> str:
    """Take a few steps and return what to tell the user; nothing is written, and the adapter is of no further use.

    Args:
        run: the run whose steps are taken.
        stream: its batches.
        parts: modules of the base, the adapter among them.
        idle: which of the parts leave the device before the first step.
    """
    watch = _Watch()
    taken = num_taken(run.arguments)
    count = run.arguments.gradient_accumulation_steps * taken
    run.hooks, batches = watch, [next(stream) for _ in range(count)]
    run.wrapped.train()
    run.optimizer.train()
    run.stream = iter(batches)
    run.train_step()
    memory = memory_of_step(run, parts)
    for _ in range(taken - 2):
        run.train_step()
    rows = [(name, size, "  (before the first step only)" if name in idle else "") for name, size in memory.items()]
    rows.append(("a step, at least", sum(size for name, size in memory.items() if name not in idle), ""))
    if run.accelerator.device.type == "cuda":
        rows.append(("a step, measured", torch.cuda.max_memory_allocated(), ""))
    seconds = fmean(watch.seconds[1:])
    total = timedelta(seconds=round(seconds * run.num_steps))
    own_texts = getattr(run.arguments, "self_composed_contexts", [])
    written = ", and the texts that the adapter writes itself" if own_texts else ""
    return "\n".join(
        [
            "Dry run: nothing is written.",
            f"The adapter has {sum(parameter.numel() for parameter in run.parameters):,} parameters.",
            "\nA batch:",
            *(f"  {line}" for line in _shapes(batches[0])),
            "\nMemory:",
            *(f"  {name:<28} {readable(size):>10}{note}" for name, size, note in rows if size),
            f"\nTime: {seconds:.3g} s a step, {total} for {run.num_steps:,} steps. Validations come on top, and what",
            f"is computed once (latents, embeddings){written}.",
        ]
    )


def memory_of_step(run: Run, parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Take a step, and return what it and those after it need of memory: name -> bytes.

    Args:
        run: the run whose step is taken.
        parts: modules of the base, the adapter among them.
    """
    with _kept_for_backward(run) as kept:
        run.train_step()
    return {name: total_bytes(_others(module, run.parameters)) for name, module in parts.items()} | {
        "adapter": total_bytes(run.parameters),
        "its gradients": total_bytes(run.parameters),
        f"optimizer ({run.arguments.optimizer})": total_bytes(_optimizer_state(run.optimizer)),
        "moving average": total_bytes(run.ema.shadow_params) if run.ema is not None else 0,
        "kept for the backward pass": kept.peak,
    }


class _Watch(StepHooks):
    """Takes the time of steps without the reading of their batches, which are there already."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start_step(self, step: int) -> None:
        self.began = perf_counter()

    def end_step(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(perf_counter() - self.began)


class AliveBytes:
    """Counts the bytes of storages for as long as they are alive.

    Attributes:
        now: how many there are.
        peak: the most that there were.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()
        self.now = self.peak = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, unless it is counted."""
        if (number := storage._cdata) not in self._known:
            self._known.add(number)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            finalize(storage, self._remove, number, storage.nbytes())

    def _remove(self, number: int, size: int) -> None:
        self._known.remove(number)
        self.now -= size


@contextmanager
def _kept_for_backward(run: Run) -> Iterator[AliveBytes]:
    """Within the body, count the storages that autograd keeps, those of parameters excepted."""
    own = {parameter.untyped_storage()._cdata for parameter in run.wrapped.parameters() if _is_plain(parameter)}
    kept = AliveBytes()

    def note(tensor: Tensor) -> Tensor:
        if _is_plain(tensor) and tensor.untyped_storage()._cdata not in own:
            kept.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has a storage of its own; those of quantized weights hold several."""
    return not hasattr(tensor, "__tensor_flatten__")


def _others(module: nn.Module, trained: Sequence[Tensor]) -> list[Tensor]:
    known = {id(parameter) for parameter in trained}
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in known]


def _optimizer_state(optimizer: Any) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the memory of tensors, each counted once."""
    return sum(_size(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _size(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)  # of quantized weights
    return tensor.nbytes if flatten is None else sum(_size(getattr(tensor, name)) for name in flatten()[0])


def _shapes(value: Any, name: str = "") -> Iterator[str]:
    """Name, shape and dtype of each tensor in a batch."""
    if isinstance(value, Tensor):
        yield f"{name:<28} {tuple(value.shape)}  {str(value.dtype).removeprefix('torch.')}"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _shapes(inner, key)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _shapes(getattr(value, field.name), field.name)


def readable(size: float) -> str:
    """Return bytes in a unit that fits them."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
