"""What repeats thousands of times leaves nothing behind: steps, contexts, adapters; and threads do not mix."""

import gc
import itertools
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from peft import PeftModel, get_peft_model

from hf_causal_context import CausalContextConfig, Context, intervene, load_context_adapter, unload_context_adapter
from hf_causal_context.adapter.conditioning.in_force import STATE
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.loop.trainer import StepHooks, fit
from hf_causal_context.training.optimization_arguments import OptimizationArguments

from .adapter.small import CONCEPTS, adapted, gpt2, inputs
from .training.conftest import on_cpu  # noqa: F401 (a fixture)
from .training.tiny_pipelines import PIPELINES

PAGE = os.sysconf("SC_PAGE_SIZE")
# Caches of libraries that fill now and then, and what earlier tests of the process left (246 were seen); a leak of one
# context or adapter in each round makes more, and is a tensor, too.
SPARE_OBJECTS = 400


class Footprint:
    """What this process holds."""

    def __init__(self):
        gc.collect()
        objects = gc.get_objects()
        self.objects = len(objects)
        self.tensors = sum(isinstance(thing, torch.Tensor) for thing in objects)
        self.kinds = Counter(type(thing).__name__ for thing in objects)
        self.memory = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        self.files = len(list(Path("/proc/self/fd").iterdir()))
        self.threads = threading.active_count(), len(list(Path("/proc/self/task").iterdir()))

    def assert_same(self, before):
        grown = (self.kinds - before.kinds).most_common(5)
        assert self.tensors <= before.tensors + 2, grown
        assert self.objects <= before.objects + SPARE_OBJECTS, grown
        assert self.memory <= 1.02 * before.memory
        assert self.files <= before.files
        assert all(now <= then for now, then in zip(self.threads, before.threads, strict=True))


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Watched(StepHooks):
    """Takes two footprints: when everything has been used often, and near the end."""

    def __init__(self, first, last):
        self.wanted, self.taken = (first // 2, first, last), []

    def start_step(self, step):
        if step in self.wanted:
            self.taken.append(Footprint())


@pytest.mark.slow
def test_two_thousand_steps_of_training_hold_no_more_than_the_first(on_cpu, tmp_path):  # noqa: F811
    model = adapted(mechanism="structural", concept_rank=1)
    contexts = itertools.cycle([["thick", (), {"slant": 0.5}], ["size", "thick+slant", ()]])
    batches = lambda start: iter(lambda: (inputs(3), next(contexts)), None)  # noqa: E731 (endless)

    def objective(model, batch):
        x, context = batch
        return model(x, context=context).square().mean(1)

    arguments = OptimizationArguments(
        output_dir=str(tmp_path / "out"), max_train_steps=2_000, checkpointing_steps=250, checkpoints_total_limit=2
    )
    watched = Watched(500, 1_990)
    fit(make_accelerator(arguments), model, objective, batches, arguments, 2_000, hooks=watched)
    _, before, after = watched.taken  # to look leaves traces, too
    after.assert_same(before)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-1750",
        "checkpoint-2000",
    ]


def switch(model, number, rows=4):
    """One of many contexts, in one of the ways to say it, for one forward pass."""
    strength = number / 1_000
    mask = torch.tensor([[strength, 0.0, 1.0]])
    kind = number % 5
    with torch.no_grad():
        if kind == 0:
            return model(inputs(rows), context={"thick": strength})
        if kind == 1:
            return model(inputs(rows), context=mask)
        with intervene(model, [{"slant": strength}, (), "thick", "size"] if kind == 2 else f"thick={strength}"):
            if kind == 3:
                with intervene(model, Context("slant") | Context({"size": strength})):
                    return model(inputs(rows))
            return model(inputs(rows))


@pytest.mark.parametrize("mechanism", ["independent", "reduced"])
def test_a_thousand_contexts_leave_nothing(mechanism):
    model = adapted(mechanism=mechanism)
    for number in range(200):
        switch(model, number)
    hooked, before = hooks(model), Footprint()
    for number in range(1_000):
        switch(model, number)
    Footprint().assert_same(before)
    assert hooks(model) == hooked
    assert STATE.box.request is STATE.box.frame is None


def test_errors_and_unfinished_forwards_leave_nothing():
    model = adapted()

    def fail(number):
        for wrong in (lambda: model(inputs(), context="color"), lambda: model(inputs(5), context=["thick", ()])):
            with pytest.raises(ValueError, match="color|5"):
                wrong()
        with pytest.raises(RuntimeError), intervene(model, {"thick": number / 100}):
            model(torch.zeros(4, 3))  # a wrong number of features

    for number in range(20):
        fail(number)
    before = Footprint()
    for number in range(200):
        fail(number)
    Footprint().assert_same(before)
    assert STATE.box.request is STATE.box.frame is None


def test_generating_in_a_hundred_contexts_leaves_nothing():
    model = adapted(gpt2(), task_type="CAUSAL_LM")
    tokens = torch.ones(2, 3, dtype=torch.long)

    def generate(number):
        given = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
        model.generate(input_ids=tokens, context=["thick", {"slant": number / 100}], **given)
        with intervene(model, {"size": number / 100}):
            model.generate(input_ids=tokens, num_beams=2, **given)

    for number in range(10):
        generate(number)
    hooked, before = hooks(model), Footprint()
    for number in range(100):
        generate(number)
    Footprint().assert_same(before)
    assert hooks(model) == hooked


@pytest.fixture
def pipeline():
    pipe = PIPELINES["ddpm"]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def adapter(pipeline, tmp_path):
    """A saved adapter, and a base without it."""
    model = get_peft_model(pipeline.unet, CausalContextConfig(concepts=CONCEPTS, init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    pipeline.unet = model.unload()
    return tmp_path / "adapter"


def sample(pipe, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(pipe(2, generator=generator, num_inference_steps=2, output_type="np").images)


@pytest.mark.slow
def test_an_adapter_comes_and_goes_a_hundred_times(pipeline, adapter):
    expected, kind = sample(pipeline), type(pipeline)

    def come_and_go():
        load_context_adapter(pipeline, adapter)
        unload_context_adapter(pipeline)

    load_context_adapter(pipeline, adapter)
    with intervene(pipeline, ["thick", "slant"]):
        changed = sample(pipeline)
    unload_context_adapter(pipeline)
    for _ in range(10):
        come_and_go()
    hooked, modules, before = hooks(pipeline.unet), len(list(pipeline.unet.modules())), Footprint()
    for _ in range(100):
        come_and_go()
    Footprint().assert_same(before)
    assert hooks(pipeline.unet) == hooked == 0
    assert len(list(pipeline.unet.modules())) == modules
    assert type(pipeline) is kind
    assert torch.equal(sample(pipeline), expected)
    load_context_adapter(pipeline, adapter)
    with intervene(pipeline, ["thick", "slant"]):
        assert torch.equal(sample(pipeline), changed)


def in_threads(work, names):
    """Run `work(name)` in a thread for each name, all at once -> their results."""
    results, barrier = {}, threading.Barrier(len(names))

    def run(name):
        barrier.wait()
        results[name] = work(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_that_sample_from_one_model_do_not_mix(pipeline, adapter):
    """A scheduler is state of its pipeline, so each thread has a pipeline; the model, which holds contexts, is one."""
    load_context_adapter(pipeline, adapter)
    pipes = {}
    for name in ("thick", "slant", "size=0.5", ""):
        pipes[name] = type(pipeline)(pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config))
        pipes[name].set_progress_bar_config(disable=True)

    def draw(name):
        with intervene(pipes[name], [name, "thick+size"]):
            return torch.stack([sample(pipes[name], seed) for seed in range(10)])

    alone = {name: draw(name) for name in pipes}
    together = in_threads(draw, list(pipes))
    for name, images in alone.items():
        assert torch.equal(together[name], images), name
    assert len({images.sum().item() for images in alone.values()}) == len(pipes)


def test_a_context_does_not_reach_threads_that_were_there_before():
    """Where a model is trained there, that is an error; at inference it is the base, with a warning."""
    model = adapted()
    plain = model(inputs())
    outside = pytest.warns(UserWarning, match="runs without a context here")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(model, inputs()).result()
        with intervene(model, "thick"):
            with outside:
                assert torch.equal(thread.submit(model, inputs()).result(), plain)
            assert not torch.equal(model(inputs()), plain)
            model.train()
            missing = pytest.raises(ValueError, match="No context is set for adapter 'default' in training mode")
            with outside, missing:
                thread.submit(model, inputs()).result()
    assert isinstance(model, PeftModel)
