"""Contexts belong to the task, thread or call that they were set for, and never reach another user's."""

import asyncio
import contextvars
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from peft import get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig, TextIteratorStreamer

from hf_causal_context import intervene
from hf_causal_context.adapter.conditioning.in_force import innermost_request
from hf_causal_context.adapter.lookup import conditionings

from ..adapter.small import adapted, config, inputs
from ..adapter.test_generation import build, tokenizer  # noqa: F401 (a fixture)

OUTSIDE = "runs without a context here"


@pytest.fixture
def pipe():
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        attention_head_dim=4,
    ).eval()
    get_peft_model(unet, config(target_modules=["to_q", "to_v", "to_out.0"]))
    pipe = DDPMPipeline(unet.eval(), DDPMScheduler(num_train_timesteps=10))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(1, generator, num_inference_steps=2, output_type="np").images)


def alone(draw, model, context):
    with intervene(model, context):
        return draw(model)


@pytest.fixture
def images(pipe):
    """What each context gives in a process without other users; the last is the base."""
    images = {context: alone(draw, pipe, context) for context in ("thick", "slant=3")}
    images[None] = draw(pipe)
    assert len({image.sum().item() for image in images.values()}) == 3
    return images


async def serve(pipe, context, turns, work=draw):
    """A request of a web server that awaits something inside the block, before and after its image is made."""
    with intervene(pipe, context):
        await turns()
        result = work(pipe)
        await turns()
        again = work(pipe)
    assert torch.equal(result, again)
    return result


class TestTasks:
    def test_interleaved_tasks_have_their_own_context_and_leave_none(self, pipe, images):
        async def both():
            return await asyncio.gather(
                *(serve(pipe, context, lambda: asyncio.sleep(0)) for context in images if context)
            )

        thick, slant = asyncio.run(both())
        assert torch.equal(thick, images["thick"])
        assert torch.equal(slant, images["slant=3"])
        assert torch.equal(draw(pipe), images[None])

    def test_so_do_tasks_that_end_in_the_order_in_which_they_began(self, pipe, images):
        async def both():
            first = asyncio.create_task(serve(pipe, "thick", lambda: asyncio.sleep(0.01)))
            await asyncio.sleep(0)
            second = asyncio.create_task(serve(pipe, "slant=3", lambda: asyncio.sleep(0.05)))
            return await first, await second

        thick, slant = asyncio.run(both())
        assert torch.equal(thick, images["thick"])
        assert torch.equal(slant, images["slant=3"])
        assert torch.equal(draw(pipe), images[None])

    def test_to_thread_has_the_context_of_the_block(self, pipe, images):
        async def run():
            with intervene(pipe, "thick"):
                return await asyncio.to_thread(draw, pipe)

        assert torch.equal(asyncio.run(run()), images["thick"])

    def test_a_task_that_outlives_its_block_is_refused(self, pipe):
        async def run():
            with intervene(pipe, "thick"):
                task = asyncio.create_task(asyncio.to_thread(draw, pipe))
            await task

        with pytest.raises(ValueError, match="in which this task or thread was started has ended"):
            asyncio.run(run())

    @pytest.mark.parametrize("place", ["task", "worker"])
    def test_compiled_models_called_by_tasks_have_their_own_context(self, place):
        model = adapted()
        expected = {context: alone(lambda model: model(inputs()), model, context) for context in ("thick", "slant")}
        compiled = torch.no_grad()(torch.compile(model, backend="eager"))

        async def work(context):
            with intervene(model, context):
                for _ in range(2):
                    await asyncio.sleep(0)
                    output = compiled(inputs()) if place == "task" else await asyncio.to_thread(compiled, inputs())
                    torch.testing.assert_close(output, expected[context])

        async def both():
            await asyncio.gather(work("thick"), work("slant"))

        asyncio.run(both())
        torch.testing.assert_close(compiled(inputs()), model(inputs()))

    @pytest.mark.filterwarnings(f"ignore:.*{OUTSIDE}")
    def test_a_compiled_model_called_by_a_task_without_a_block_is_the_base(self):
        model = adapted()
        base = model(inputs())
        compiled = torch.no_grad()(torch.compile(model, backend="eager"))

        async def inside():
            with intervene(model, "thick"):
                compiled(inputs())
                await asyncio.sleep(0.01)

        async def outside():
            return compiled(inputs())

        async def both():
            return (await asyncio.gather(inside(), outside()))[1]

        torch.testing.assert_close(asyncio.run(both()), base)

    def test_a_task_is_told_that_its_block_has_ended_after_one_of_its_own_too(self, pipe, images):
        async def work(turns):
            with intervene(pipe, "slant=3"):
                await turns()
                assert torch.equal(draw(pipe), images["slant=3"])
            return draw(pipe)

        async def run():
            with intervene(pipe, "thick"):
                task = asyncio.create_task(work(lambda: asyncio.sleep(0.01)))
                await asyncio.sleep(0)
            await task

        with pytest.raises(ValueError, match="in which this task or thread was started has ended"):
            asyncio.run(run())


class TestGenerators:
    def test_generators_that_take_turns_are_told_and_leave_no_context(self, pipe, images):
        def steps(context):
            with intervene(pipe, context):
                yield draw(pipe)
                yield draw(pipe)

        first, second = steps("thick"), steps("slant=3")
        assert torch.equal(next(first), images["thick"])
        assert torch.equal(next(second), images["slant=3"])
        with pytest.warns(UserWarning, match="Do not `yield` inside the block"):
            list(first)
        list(second)
        assert torch.equal(draw(pipe), images[None])

    @pytest.mark.filterwarnings("ignore:.*block ended before one that was opened inside")
    def test_generators_that_overlap_without_an_end_leave_no_requests_behind(self):
        model = adapted()

        def steps():
            with intervene(model, "thick"):
                yield weakref.ref(innermost_request(conditionings(model)[0]))

        current, requests = steps(), []
        requests.append(next(current))
        for _ in range(3):
            following = steps()
            requests.append(next(following))
            current.close()
            current = following
        assert [request() is None for request in requests] == [True, True, True, False]

    def test_one_that_ends_on_another_thread_leaves_the_forward_there_alone(self):
        model = adapted()
        base = model(inputs())
        expected = model(inputs(), context=["thick", "slant", (), "size"])

        def steps():
            with intervene(model, "thick"):
                yield

        generator = steps()
        next(generator)

        def close(*_):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(generator.close).result()

        handle = model.get_base_model().second.register_forward_pre_hook(close)
        torch.testing.assert_close(model(inputs(), context=["thick", "slant", (), "size"]), expected)
        handle.remove()
        with pytest.raises(ValueError, match="where a generator opened it, and was closed elsewhere"):
            model(inputs())
        alone(lambda model: model(inputs()), model, "slant")  # any block that is opened here tidies up
        assert torch.equal(model(inputs()), base)

    def test_steps_in_contexts_of_their_own_are_told_that_they_are_outside(self, pipe, images):
        """So Gradio runs them: each on some thread, in a copy of the context."""

        def steps():
            with intervene(pipe, "thick"):
                yield draw(pipe)
                yield draw(pipe)

        generator = steps()
        with ThreadPoolExecutor(1) as pool:

            def step():
                return pool.submit(contextvars.copy_context().run, next, generator, None).result()

            assert torch.equal(step(), images["thick"])
            with pytest.warns(UserWarning, match=OUTSIDE):
                assert torch.equal(step(), images[None])
            step()
            assert torch.equal(pool.submit(draw, pipe).result(), images[None])
        assert torch.equal(draw(pipe), images[None])


class TestThreads:
    def test_a_thread_that_is_started_inside_has_the_context(self, pipe, images):
        results = []
        with intervene(pipe, "thick"):
            thread = threading.Thread(target=lambda: results.append(draw(pipe)))
            thread.start()
            thread.join()
        assert torch.equal(results[0], images["thick"])

    def test_of_a_streamer_too(self, tokenizer):  # noqa: F811
        model = build("llama")
        ids = torch.tensor([[3, 9, 17, 20]])
        expected = model.generate(input_ids=ids, context="thick", max_new_tokens=6, do_sample=False)
        assert not torch.equal(expected, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
        options = {"input_ids": ids, "streamer": streamer, "max_new_tokens": 6, "do_sample": False}
        with intervene(model, "thick"):
            thread = threading.Thread(target=model.generate, kwargs=options)
            thread.start()
            assert "".join(streamer).split() == tokenizer.decode(expected[0, 4:]).split()
            thread.join()

    def test_threads_that_share_one_object_have_blocks_of_their_own(self, pipe, images):
        shared, one_is_done, results = intervene(pipe, "thick"), threading.Event(), []

        def work():
            with shared:
                one_is_done.wait()
                results.append(draw(pipe))

        with shared:
            thread = threading.Thread(target=contextvars.Context().run, args=(work,))
            thread.start()
            while len(shared._entered) < 2:
                time.sleep(0.001)
        with pytest.warns(UserWarning, match=OUTSIDE):
            assert torch.equal(draw(pipe), images[None])
        one_is_done.set()
        thread.join()
        assert torch.equal(results[0], images["thick"])

    def test_an_executors_worker_is_outside_wherever_it_was_started(self, pipe, images):
        with ThreadPoolExecutor(1) as pool:
            with intervene(pipe, "thick"), pytest.warns(UserWarning, match=OUTSIDE):
                assert torch.equal(pool.submit(draw, pipe).result(), images[None])
            with intervene(pipe, "slant=3"):
                image = pool.submit(contextvars.copy_context().run, draw, pipe).result()
            assert torch.equal(image, images["slant=3"])
            assert torch.equal(pool.submit(draw, pipe).result(), images[None])

    def test_the_base_is_used_silently_where_no_block_is_open(self, pipe, images):
        alone(draw, pipe, "thick")
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(draw, pipe).result(), images[None])


class TestContinuousBatching:
    PROMPTS = ([3, 9, 17, 20], [40, 5, 33, 2, 7])

    @pytest.fixture
    def model(self):
        return build("llama")

    def options(self):
        settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
        memory = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # by default, most of the machine's
        return {"generation_config": settings, "continuous_batching_config": memory}

    def batched(self, model, **options):
        results = model.generate_batch(list(self.PROMPTS), **options, **self.options())
        return [result.generated_tokens for result in results.values()]

    def one_by_one(self, model):
        options = {"max_new_tokens": 6, "do_sample": False}
        rows = [model.generate(input_ids=torch.tensor([ids]), **options)[0] for ids in self.PROMPTS]
        return [row[len(ids) :].tolist() for row, ids in zip(rows, self.PROMPTS, strict=True)]

    def test_it_has_the_context_of_the_block(self, model):
        base = self.batched(model)
        assert base == self.one_by_one(model)
        with intervene(model, "thick"):
            assert self.batched(model) == self.one_by_one(model) != base
        assert self.batched(model) == base

    @pytest.mark.parametrize("form", ["PeftModel", "base"])
    def test_it_takes_a_context_as_generate_does(self, model, form):
        model = model if form == "PeftModel" else model.get_base_model()
        base = self.batched(model)
        with intervene(model, "thick"):
            expected = self.batched(model)
        assert self.batched(model, context="thick") == expected != base
        with pytest.raises(ValueError, match="Unknown concept 'wide'"):
            self.batched(model, context="wide")

    def test_several_contexts_are_refused(self, model):
        with (
            intervene(model, ["thick", "slant"]),
            pytest.raises(ValueError, match="they cannot have different contexts"),
        ):
            self.batched(model)

    def test_a_kept_manager_serves_its_own_context_only(self, model):
        with intervene(model, "thick"):
            expected = self.batched(model, persistent_manager=True)
            assert self.batched(model, persistent_manager=True) == expected
        with intervene(model, "slant"), pytest.raises(ValueError, match="was made in another context"):
            self.batched(model)
        model.destroy_cached_continuous_batching_manager()
        with intervene(model, "slant"):
            assert self.batched(model) == self.one_by_one(model)

    def test_a_manager_takes_prompts_and_runs_in_its_own_context_only(self, model):
        base = model.get_base_model()
        with intervene(model, "thick"):
            expected = self.one_by_one(model)
            manager = base.init_continuous_batching(**self.options())
        with pytest.raises(ValueError, match="was made in another context"):
            manager.start()
        with intervene(model, "thick"):
            manager.start()
            try:
                with intervene(model, "slant"), pytest.raises(ValueError, match="was made in another context"):
                    manager.add_request([3, 9])
                with intervene(model, ["thick", "slant"]), pytest.raises(ValueError, match="have different contexts"):
                    manager.add_request([3, 9])
                manager.add_requests(list(self.PROMPTS))
                results = [manager.get_result(timeout=20) for _ in self.PROMPTS]
            finally:
                manager.stop(block=True)
        assert [each.generated_tokens for each in sorted(results, key=lambda each: each.request_id)] == expected
