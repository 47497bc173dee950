"""What only a GPU shows; skipped without one. GPU_TEST_DEVICE=cpu runs the file on a CPU, to find mistakes in it."""

import copy
import math

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model, set_peft_model_state_dict

from hf_causal_context import bake, causal_effects, intervene, load_context_adapter, unload_context_adapter
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data.worlds.digits import CONCEPTS as DIGIT_CONCEPTS
from hf_causal_context.inference.sampling import generate
from hf_causal_context.quickstart import BASE
from hf_causal_context.training.language import train_text

from ..adapter.small import MIXED, VARIANTS, adapted
from ..architectures import ARCHITECTURES
from ..test_pipelines import BUILDERS, CONTEXTS, build, denoiser, run, write_adapter
from ..training.small import adapter_weights
from ..training.small_language import arguments, language_model, text_data, word_tokenizer
from .conftest import DEVICE, ON_GPU, needs_gpu

BACKEND = "inductor" if ON_GPU else "eager"  # on a CPU inductor takes minutes
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
SAME = {"rtol": 1e-4, "atol": 1e-5}  # float32 on one device, computed in another order
ACROSS = {"rtol": 1e-3, "atol": 1e-3}  # float32 on two devices, through several steps of a sampler

pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU")


def moved(values, device=DEVICE):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def small(name, **kwargs):
    """A tiny model with an adapter on the device, and a function that calls it on some rows in the same way."""
    architecture = ARCHITECTURES[name]
    targets = {"target_modules": ATTENTION} if name == "unet2d_condition" else {}
    model = adapted(architecture.build(), **{"alpha": 0.2} | targets | kwargs).to(DEVICE)
    values = moved(architecture.inputs(4))
    return model, lambda called=model, **more: architecture.output(called(**values, **more))


def test_what_concepts_change_is_read_from_weights_there():
    for variant in ("independent", "reduced, anchored"):
        model, _ = small("unet2d_condition", **VARIANTS[variant])
        effects = causal_effects(model)
        here = causal_effects(model.cpu())
        torch.testing.assert_close(effects.changes, here.changes, **SAME)
        torch.testing.assert_close(effects.interventional, here.interventional, **SAME)


class TestDenoisers:
    @pytest.mark.parametrize("variant", ["independent", "reduced, anchored", "structural, anchored, ordered"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_without_an_observational_part_the_empty_context_is_the_base_bit_for_bit(self, variant, dtype):
        architecture = ARCHITECTURES["unet2d_condition"]
        values = {
            n: v.to(DEVICE, dtype if v.is_floating_point() else v.dtype) for n, v in architecture.inputs(4).items()
        }
        base = architecture.build().to(DEVICE, dtype)
        options = VARIANTS[variant] | {"observational_rank": 0, "target_modules": ATTENTION}
        model = adapted(copy.deepcopy(base), **options).to(DEVICE, dtype)
        with torch.no_grad():
            expected = base(**values).sample
            assert torch.equal(model(**values).sample, expected)
            assert torch.equal(model(**values, context=()).sample, expected)
            mixed = model(**values, context=MIXED).sample  # the second row is ()
        assert torch.equal(mixed[1], expected[1])
        assert not any(torch.equal(mixed[row], expected[row]) for row in (0, 2, 3))

    @pytest.mark.parametrize("name", ["unet2d_condition", "flux", "wan", "autoencoder_kl", "llama", "t5"])
    def test_masks_and_mixed_rows(self, name):
        model, call = small(name, mechanism="reduced")
        mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, -0.5, 2], [1, 1, 0]], device=DEVICE)
        with torch.no_grad():
            expected = call(context=MIXED)
            assert torch.equal(call(context=mask), expected)
            with intervene(model, mask):
                assert torch.equal(call(), expected)
            if ON_GPU:  # a copy in every forward would wait for the device
                with pytest.raises(ValueError, match="lies on cpu, the model's input on cuda:0. Move it"):
                    call(context=mask.cpu())
            apart = torch.cat([call(context=context)[i : i + 1] for i, context in enumerate(MIXED)])
        torch.testing.assert_close(expected, apart, **SAME)
        on_cpu = model.to("cpu")
        values = ARCHITECTURES[name].inputs(4)
        with torch.no_grad():
            output = ARCHITECTURES[name].output(on_cpu(**values, context=MIXED))
        torch.testing.assert_close(expected.cpu(), output, **ACROSS)

    @pytest.mark.parametrize("mechanism", ["independent", "reduced", "structural"])
    def test_baked_merged_and_saved(self, mechanism, tmp_path):
        model, call = small("unet2d_condition", mechanism=mechanism)
        context = {"thick": 1.0, "size": -0.5}
        architecture = ARCHITECTURES["unet2d_condition"]
        with torch.no_grad(), intervene(model, context):
            expected = call()
            lora = get_peft_model(architecture.build().to(DEVICE), bake(model, context)[0])
            set_peft_model_state_dict(lora, bake(model, context)[1])
            torch.testing.assert_close(call(lora.eval()), expected, **SAME)
            torch.testing.assert_close(call(lora.merge_and_unload()), expected, **SAME)
            model.merge_adapter()
            torch.testing.assert_close(call(), expected, **SAME)
            model.unmerge_adapter()
            torch.testing.assert_close(call(), expected, **SAME)
        model, call = small("unet2d_condition", mechanism=mechanism)
        model.save_pretrained(tmp_path)
        on_cpu = PeftModel.from_pretrained(architecture.build(), str(tmp_path), torch_device="cpu").eval()
        with torch.no_grad():
            output = on_cpu(**architecture.inputs(4), context=context).sample
        assert output.device.type == "cpu"
        torch.testing.assert_close(output, expected.cpu(), **ACROSS)

    @pytest.mark.parametrize("precision", [None, torch.bfloat16])
    @pytest.mark.parametrize("name", ["unet2d_condition", "llama"])
    def test_gradient_checkpointing(self, name, precision):
        model, call = small(name, mechanism="reduced")
        model.train()

        def gradients(compute_in=MIXED):
            model.zero_grad()
            with intervene(model, MIXED), torch.autocast(DEVICE.type, precision, enabled=precision is not None):
                loss = call().float().square().mean()
            with intervene(model, compute_in):  # backward may run in another context than the forward
                loss.backward()
            return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

        expected = gradients()
        base = model.get_base_model()
        if name == "llama":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.enable_gradient_checkpointing()
        for compute_in in (MIXED, "size"):
            actual = gradients(compute_in)
            assert (actual - expected).norm() < (1e-5 if precision is None else 1e-2) * expected.norm()


@pytest.mark.usefixtures("_fresh_compiler")
class TestCompile:
    """With inductor. A list of contexts, a single one and a tensor are three forms; each is compiled once."""

    @staticmethod
    def check(model, call, compiled):
        with torch.no_grad():
            for context in (MIXED, "thick+size", torch.rand(4, 3, device=DEVICE)):
                with intervene(model, context), intervene(compiled, context):
                    torch.testing.assert_close(call(compiled), call(), **SAME)
            with torch._dynamo.config.patch(error_on_recompile=True):
                masks = torch.rand(4, 3, device=DEVICE)
                for context in (MIXED[::-1], "slant", {"size": -1.0}, masks, [("thick",), (), (), "size"]):
                    with intervene(model, context), intervene(compiled, context):
                        torch.testing.assert_close(call(compiled), call(), **SAME)

    @pytest.mark.parametrize("mechanism", ["independent", "structural"])
    def test_denoiser(self, mechanism):
        model, call = small("unet2d_condition", mechanism=mechanism)
        self.check(model, call, torch.compile(model, fullgraph=True, backend=BACKEND))

    def test_blocks_of_a_denoiser(self):
        model, call = small("unet2d_condition", mechanism="reduced")
        compiled = copy.deepcopy(model)
        compiled.get_base_model().compile_repeated_blocks(fullgraph=True, backend=BACKEND)
        self.check(model, call, compiled)

    def test_llama(self):
        model, call = small("llama", task_type="CAUSAL_LM")
        self.check(model, call, torch.compile(model, fullgraph=True, backend=BACKEND))

    def test_gradients(self):
        model, call = small("unet2d_condition", mechanism="reduced")
        model.train()
        compiled = torch.compile(model, fullgraph=True, backend=BACKEND)

        def gradients(called):
            model.zero_grad()
            with intervene(model, MIXED):
                call(called).square().mean().backward()
            return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

        expected = gradients(model)
        assert (gradients(compiled) - expected).norm() < 1e-4 * expected.norm()


class TestPipelines:
    @pytest.mark.parametrize("name", BUILDERS)
    def test_a_pipeline_on_the_device_draws_what_the_cpu_draws(self, name, tmp_path):
        plain = build(name)
        folder = write_adapter(denoiser(plain), tmp_path)
        pipe = load_context_adapter(copy.deepcopy(plain), folder)
        with intervene(pipe, CONTEXTS):
            expected = run(name, pipe)
        plain.to(DEVICE)
        pipe = load_context_adapter(copy.deepcopy(plain), folder)  # onto the device where the pipeline is
        assert {parameter.device.type for parameter in denoiser(pipe).parameters()} == {DEVICE.type}
        with intervene(pipe, CONTEXTS):
            torch.testing.assert_close(run(name, pipe), expected, **ACROSS)
        assert (expected - run(name, pipe)).abs().max() > 5e-3
        unload_context_adapter(pipe)
        assert torch.equal(run(name, pipe), run(name, plain))

    @pytest.mark.parametrize(
        "how",
        ["model", "sequential", "block_level", "leaf_level", pytest.param("leaf_level, stream", marks=needs_gpu)],
    )
    def test_offloading_after_loading(self, how, tmp_path):
        name = "stable_diffusion"
        folder = write_adapter(build(name).unet, tmp_path)
        with intervene(pipe := load_context_adapter(build(name).to(DEVICE), folder), CONTEXTS):
            expected = run(name, pipe)
        pipe = load_context_adapter(build(name), folder)
        kind, _, stream = how.partition(", ")
        if kind == "model":
            pipe.enable_model_cpu_offload(device=DEVICE)
        else:
            for part in (pipe.vae, pipe.text_encoder):
                part.to(DEVICE)
        if kind == "sequential":
            cpu_offload(pipe.unet, DEVICE, offload_buffers=True)  # what enable_sequential_cpu_offload does with a part
        elif kind != "model":
            blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            pipe.unet.enable_group_offload(
                DEVICE, torch.device("cpu"), offload_type=kind, use_stream=bool(stream), **blocks
            )
        with intervene(pipe, CONTEXTS):
            torch.testing.assert_close(run(name, pipe), expected, **SAME)

    def test_seeds_give_the_same_images_on_either_device(self, tmp_path):
        folder = write_adapter(load_base(str(BASE)).denoiser, tmp_path, concepts=DIGIT_CONCEPTS, alpha=2.0)
        images = []
        for device in ("cpu", DEVICE):
            base = load_base(str(BASE))
            base.pipe.to(device)
            load_context_adapter(base.pipe, folder)
            rows = generate(base, [(), "thickness", "slant+size"], seeds=[3, 5], num_inference_steps=4)
            assert {row.device.type for row in rows} == {"cpu"}
            images.append(torch.stack(rows))
        torch.testing.assert_close(images[1], images[0], rtol=0, atol=5e-3)
        assert (images[0][1:] - images[0][:1]).abs().max() > 0.05


class TestLanguage:
    @pytest.mark.usefixtures("_fresh_run")
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_bfloat16_training_resumes_bit_for_bit(self, name, tmp_path, logged):
        def train_steps(folder, steps, resume=None):
            model = language_model(name, dropout=True).to(torch.bfloat16)  # draws on the device
            given = arguments(
                tmp_path, output_dir=str(tmp_path / folder), max_train_steps=steps, checkpointing_steps=3,
                mixed_precision="bf16", packing=name == "llama", resume_from_checkpoint=resume,
            )  # fmt: skip
            torch.manual_seed(steps)  # of the process that starts the run
            return adapter_weights(train_text(given, model, word_tokenizer(), text_data()))

        whole = train_steps("whole", 6)
        assert len(logged) == 6
        assert all(math.isfinite(loss) for loss in logged)
        train_steps("parts", 3)
        resumed = train_steps("parts", 6, "latest")
        assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())

    @pytest.mark.usefixtures("_fresh_compiler")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_generation_in_contexts_per_prompt(self, dtype):
        model, _ = small("llama", task_type="CAUSAL_LM", mechanism="reduced", alpha=None)
        model.to(dtype)
        settings = model.generation_config
        settings.eos_token_id, settings.pad_token_id = None, 0
        ids = torch.randint(3, 62, (4, 4), generator=torch.Generator().manual_seed(1)).to(DEVICE)

        def write(rows=slice(None), **kwargs):
            own = ids[rows]
            options = {"attention_mask": torch.ones_like(own), "max_new_tokens": 6, "do_sample": False}
            return model.generate(input_ids=own, **options, **kwargs)

        together = write(context=MIXED)
        assert not torch.equal(together, write(context=()))
        if dtype == torch.float32:  # in bfloat16 the batch size changes the rounding
            apart = [write(slice(i, i + 1), context=context) for i, context in enumerate(MIXED)]
            assert torch.equal(together, torch.cat(apart))
            assert torch.equal(write(context=MIXED, num_beams=3), write(context=MIXED, num_beams=3, use_cache=False))
        # On a GPU transformers compiles the decoding steps of a static cache by itself, into CUDA graphs.
        compiled = transformers.CompileConfig(backend=BACKEND, mode="reduce-overhead" if ON_GPU else None)
        compiled._compile_all_devices = True
        static = {"cache_implementation": "static", "compile_config": compiled}
        plain = {"cache_implementation": "static", "disable_compile": True}
        for context in (MIXED, MIXED[::-1], "thick", "slant+size"):
            if dtype == torch.float32:
                assert torch.equal(write(context=context, **static), write(context=context))
            else:
                same = write(context=context, **static) == write(context=context, **plain)
                assert same.float().mean() > 0.8  # compiled kernels round less often
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
