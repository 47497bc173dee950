"""Saved tiny pipelines, and training runs on them."""

import itertools
import multiprocessing
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from .run_tiny import Faults, Place, main
from .tiny_pipelines import PIPELINES
from .tiny_videos import VIDEOS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A function: name of a tiny pipeline -> the folder it is saved in."""
    folders = {}

    def save(name):
        if name not in folders:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                pipe = (PIPELINES | VIDEOS)[name]()
            folders[name] = str(tmp_path_factory.mktemp(name))
            pipe.save_pretrained(folders[name])
        return folders[name]

    return save


@pytest.fixture
def on_cpu(tmp_path, monkeypatch):
    """Runs in this process compute on the CPU, know nothing of earlier ones, and have a cache of their own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield from apart(tmp_path, monkeypatch)


def apart(tmp_path, monkeypatch):
    """While this generator waits, runs know nothing of earlier ones, and have a cache of their own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class Run:
    """A training run in another process."""

    process: multiprocessing.process.BaseProcess
    outcome: Path

    def wait(self):
        """What it said at its end: the output folder, or the type and message of its error; None if it was killed."""
        self.process.join(220)
        assert self.process.exitcode is not None, "the run hangs"
        return self.outcome.read_text() if self.outcome.exists() else None


@pytest.fixture
def start(tmp_path_factory, monkeypatch):
    """A function that starts a training run in another process: settings, faults, place -> Run."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.run_tiny"])
    cache, runs = tmp_path_factory.mktemp("cache"), []

    def begin(settings, faults=None, place=None):
        outcome = tmp_path_factory.mktemp("run") / "outcome"
        arguments = (str(outcome), str(cache), settings, faults or Faults(), place)
        run = Run(context.Process(target=main, args=arguments), outcome)
        run.process.start()
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.process.kill()
        run.process.join()


@pytest.fixture
def together(start, tmp_path):
    """A function: settings, number of processes, faults by rank -> the runs."""
    numbers = itertools.count()

    def begin(given, world_size, faults=None):
        rendezvous = str(tmp_path / f"rendezvous-{next(numbers)}")
        places = [Place(rank, world_size, rendezvous) for rank in range(world_size)]
        return [start(given, (faults or {}).get(place.rank), place) for place in places]

    return begin


@pytest.fixture
def small_disk(tmp_path):
    """A function: size -> a file system of its own of that size, mounted for real."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)
