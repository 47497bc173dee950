"""Where the tests of this folder run: on a GPU, or with GPU_TEST_DEVICE=cpu on a CPU, to find mistakes in them."""

import os

import pytest
import torch
from accelerate import Accelerator

from ..training.conftest import apart, pipeline_folder

__all__ = ["pipeline_folder"]

DEVICE = torch.device(os.environ.get("GPU_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="has no meaning on a CPU")


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    """Full float32, and the algorithms that give the same bits each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


@pytest.fixture
def _fresh_run(tmp_path, monkeypatch):
    """Runs know nothing of earlier ones, and have a cache of their own."""
    if not ON_GPU:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield from apart(tmp_path, monkeypatch)


@pytest.fixture
def logged(monkeypatch):
    """The losses of all steps that are taken."""
    losses, log = [], Accelerator.log

    def record(self, values, step):
        losses.extend(values[name] for name in ("loss",) if name in values)
        log(self, values, step=step)

    monkeypatch.setattr(Accelerator, "log", record)
    return losses


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
