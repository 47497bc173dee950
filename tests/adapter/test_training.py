"""Gradients under checkpointing, in two processes and in compiled graphs."""

import importlib
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from hf_causal_context import intervene
from hf_causal_context.adapter.conditioning.matrices import causal_matrices
from hf_causal_context.adapter.lookup import adapted_layers

from ..architectures import ARCHITECTURES
from .small import CONCEPTS, MIXED, VARIANTS, Mlp, adapted, gpt2, inputs

IDS = torch.arange(12).view(4, 3)


def gradients(model, run):
    model.zero_grad()
    run().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    assert any(g.abs().max() > 1e-4 for g in left.values())
    for name in left:
        torch.testing.assert_close(left[name], right[name], **({"rtol": 1e-5, "atol": 1e-7} | tolerance), msg=name)


class TestCheckpointing:
    @staticmethod
    def transformer():
        model = adapted(gpt2(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0), mechanism="reduced").train()
        return model, lambda: model(IDS, labels=IDS)["loss"]

    @staticmethod
    def denoiser():
        architecture = ARCHITECTURES["unet2d_condition"]
        model = adapted(architecture.build(), target_modules=["to_q", "to_v", "conv1"], alpha=0.2).train()
        return model, lambda: architecture.output(model(**architecture.inputs(4))).square().mean()

    @staticmethod
    def enable(model, use_reentrant):
        base = model.get_base_model()
        if hasattr(base, "gradient_checkpointing_enable"):
            model.enable_input_require_grads()  # as for LoRA: reentrant checkpoints need an input with a gradient
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        else:
            base.enable_gradient_checkpointing(
                lambda module, *args: checkpoint(
                    module.__call__ if isinstance(module, torch.nn.Module) else module,
                    *(a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args),
                    use_reentrant=use_reentrant,
                )
            )

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("kind", ["transformer", "denoiser"])
    def test_gradients_are_those_of_the_forward_context(self, kind, use_reentrant):
        model, loss = getattr(self, kind)()
        with intervene(model, MIXED):
            expected = gradients(model, loss)
        self.enable(model, use_reentrant)
        with intervene(model, MIXED):
            assert_same(gradients(model, loss), expected)
        # the context is gone, or another one is set, when backward computes the blocks again
        with intervene(model, MIXED):
            value = loss()
        assert_same(gradients(model, lambda: value), expected)
        with intervene(model, MIXED):
            value = loss()
        with intervene(model, "size"):
            assert_same(gradients(model, lambda: value), expected)
        assert len({g.abs().sum() for g in expected.values()}) > 1

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoints_of_unknown_origin_are_an_error(self, use_reentrant):
        class Checkpointed(Mlp):
            def forward(self, x):
                return self.second(checkpoint(self.first, x, use_reentrant=use_reentrant))

        model = adapted(Checkpointed(), target_modules=["first", "second"]).train()
        with intervene(model, MIXED):
            loss = model(inputs().requires_grad_()).sum()
            with pytest.raises(RuntimeError, match="computed again inside backward .* cannot be known which context"):
                loss.backward()

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpointed_model_takes_its_context_as_an_argument(self, use_reentrant):
        model, x = adapted().train(), inputs().requires_grad_()
        expected = gradients(model, lambda: model(x, context=MIXED).sum())

        def call(x, context):
            return model(x, context=context)

        def loss(context):
            return checkpoint(call, x, context, use_reentrant=use_reentrant).sum()

        assert_same(gradients(model, lambda: loss(MIXED)), expected)
        with intervene(model, "thick"), pytest.raises(RuntimeError, match="with context= as one of its arguments"):
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    command = [sys.executable, "-m", "tests.adapter.two_processes"]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root) for rank in range(2)]
    try:
        assert [process.wait(timeout=220) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    model = adapted(mechanism="reduced").train()
    expected = gradients(model, lambda: 2 * model(inputs(), context=MIXED).square().mean())
    # DistributedDataParallel; FSDP2, which keeps a half of every weight in each; a half of every frozen weight only.
    for kind in ("whole", "sharded", "on_pieces"):
        for rank in range(2):
            assert_same(load_file(tmp_path / f"{kind}-{rank}.safetensors"), expected)


def test_no_matrices_are_made_of_pieces_of_weights():
    """FSDP1 holds them as flat pieces of any length until a layer runs."""
    layers = list(adapted_layers(adapted(mechanism="structural")).values())
    strengths = torch.ones(1, 1 + len(CONCEPTS))
    assert causal_matrices(layers, "default", strengths).keys() == {"first", "second"}
    for weight in layers[0].causal("default").parameters():
        weight.data = weight.data.flatten()[:5]
    assert causal_matrices(layers, "default", strengths).keys() == {"second"}


class TestDataParallel:
    """Which transformers' Trainer uses, unasked, on a machine with several GPUs."""

    @pytest.fixture
    def run(self, monkeypatch):
        """`DataParallel`, which needs GPUs: PyTorch's own copies of a model, on threads, with halves of a batch."""
        torchs = importlib.import_module("torch.nn.parallel.replicate")
        monkeypatch.setattr(torchs, "_get_device_index", lambda device, _: device)
        monkeypatch.setattr(
            torchs,
            "_broadcast_coalesced_reshape",
            lambda tensors, devices, detach: [[tensor.view_as(tensor) for tensor in tensors] for _ in devices],
        )

        def run(model, x, **arguments):
            halves = [{name: value.chunk(2)[half] for name, value in arguments.items()} for half in range(2)]
            futures = [Future() for _ in halves]

            def work(future, replica, part, arguments):
                try:
                    future.set_result(replica(part, **arguments))
                except Exception as error:
                    future.set_exception(error)

            each = zip(futures, torchs.replicate(model, [0, 1]), x.chunk(2), halves, strict=True)
            threads = [Thread(target=work, args=args) for args in each]
            for thread in threads:
                thread.start()
                thread.join()
            return torch.cat([future.result() for future in futures])

        return run

    @pytest.mark.parametrize("variant", ["independent", "reduced, anchored", "structural"])
    @pytest.mark.parametrize("tokens", [1, 200])
    def test_it_has_the_contexts_and_the_gradients_of_the_model(self, run, variant, tokens):
        model = adapted(**VARIANTS[variant]).train()
        x = inputs(4 * tokens).view(4, tokens, 10)
        mask = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, -0.5, 2], [1, 1, 0]])
        expected = gradients(model, lambda: model(x, context=mask).square().mean())
        for _ in range(2):
            assert_same(gradients(model, lambda: run(model, x, context=mask).square().mean()), expected)
        model.eval()
        with intervene(model, "thick"):
            torch.testing.assert_close(run(model, x), model(x))
        torch.testing.assert_close(model(x, context="thick"), model(x, context=mask[:1]))
        torch.testing.assert_close(run(model, x), model(x))

    def test_contexts_that_it_does_not_cut_are_refused(self, run):
        model = adapted()
        with intervene(model, MIXED), pytest.raises(ValueError, match="DataParallel cuts the batch into parts"):
            run(model, inputs())
        with (
            intervene(model, MIXED[:2], images_per_prompt=2),
            pytest.raises(ValueError, match=r"Pass the contexts as a mask, model\(..., context=mask\)"),
        ):
            run(model, inputs())


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("variant", ["independent", "reduced, anchored", "structural"])
    @pytest.mark.slow
    def test_other_contexts_do_not_recompile(self, variant):
        model, x = adapted(**VARIANTS[variant]), inputs()
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for contexts in (MIXED, [*MIXED[::-1]], [{"thick": s} for s in (0.1, 0.2, 0.3, 0.4)]):
            with intervene(model, contexts):
                torch.testing.assert_close(compiled(x), model(x))
        assert len(graphs) == 1
        for _ in range(3):
            mask = torch.rand(4, 3)
            torch.testing.assert_close(compiled(x, context=mask), model(x, context=mask))
        assert len(graphs) == 2

    def test_training_with_the_default_backend(self):
        model, x = adapted(Mlp(), mechanism="reduced").train(), inputs()
        expected = gradients(model, lambda: model(x, context=MIXED).square().sum())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with intervene(model, MIXED):
            assert_same(gradients(model, lambda: compiled(x).square().sum()), expected)

    @pytest.mark.parametrize("name", ["dit", "flux"])
    @pytest.mark.slow
    def test_denoisers(self, name):
        architecture = ARCHITECTURES[name]
        model = adapted(architecture.build(), alpha=0.2)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        values = architecture.inputs(4)
        with torch.no_grad():
            for contexts in (MIXED, "thick+size"):
                with intervene(model, contexts):
                    output, expected = (architecture.output(run(**values)) for run in (compiled, model))
                    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_learns_its_contexts():
    """Every context has its own target; the combination never trained follows when effects add."""
    torch.manual_seed(0)
    base = torch.nn.Linear(10, 4)
    shifts = {name: torch.randn(4, 10) for name in CONCEPTS[:2]}
    model = adapted(torch.nn.Sequential(base), concepts=CONCEPTS[:2], target_modules=["0"], init_weights=True).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    frozen = base.weight.detach().clone(), base.bias.detach().clone()
    for _ in range(300):
        x = torch.randn(30, 10)
        contexts = [(), "thick", "slant"] * 10
        target = torch.nn.functional.linear(x, *frozen)
        rows = zip(contexts, x, strict=True)
        target = target + torch.stack([shifts[c] @ row if c else torch.zeros(4) for c, row in rows])
        optimizer.zero_grad()
        (model(x, context=contexts) - target).square().mean().backward()
        optimizer.step()
    x = torch.randn(200, 10)
    target = torch.nn.functional.linear(x, *frozen) + x @ (shifts["thick"] + shifts["slant"]).T
    error = (model.eval()(x, context="thick+slant") - target).square().mean() / target.var()
    assert error < 0.01
