"""A layer launches at most one operation more than LoRA's, whatever mixes concepts, and the same comes out."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from examples.benchmarks import launches
from hf_causal_context import intervene
from hf_causal_context.adapter.conditioning import hooks
from hf_causal_context.adapter.conditioning.matrices import causal_matrices
from hf_causal_context.adapter.lookup import adapted_layers

from .small import MIXED, VARIANTS, adapted, gpt2


@pytest.fixture
def without_matrices(monkeypatch):
    """Call to let every layer mix its features itself, row by row."""

    def off():
        monkeypatch.setattr(hooks, "causal_matrices", lambda *args: {})

    return off


def per_layer(measure, name):
    """Launches of one more adapted layer."""
    fewer, more = (measure(launches.adapted(name, layers)) - measure(launches.base(layers)) for layers in (8, 16))
    return (more - fewer) / 8


@pytest.mark.parametrize("name", launches.CONFIGS)
@pytest.mark.parametrize("tokens", [1, 4, 256])
def test_a_layer_launches_at_most_one_operation_more_than_lora(name, tokens):
    for measure in (launches.training_step, launches.forward_pass):
        mine, theirs = (
            per_layer(lambda model, measure=measure: measure(model, tokens), each) for each in (name, "LoRA")
        )
        assert mine <= theirs + 1, measure


# Of a part of torch that making code imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.slow
def test_a_compiled_layer_has_at_most_one_kernel_more_than_lora():
    kernels = {name: sum(launches.compiled_layer(name)) for name in ("LoRA", "independent", "structural, a chain")}
    theirs = kernels["LoRA"]
    assert theirs > 0
    assert kernels["independent"] <= theirs  # the mask is the scale's kernel, and sums are part of products
    assert max(kernels.values()) <= theirs + 1, kernels


@pytest.mark.slow
def test_a_compiled_layer_gives_what_it_gives_uncompiled():
    x = torch.randn(4, 6, launches.FEATURES, dtype=torch.float64, requires_grad=True)
    for name in ("independent", "reduced"):
        model = launches.adapted(name, 2).double().train()
        weights = [x, *(p for p in model.parameters() if p.requires_grad)]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with intervene(model, launches.MIXED):
            pairs = [(y, torch.autograd.grad(y.square().sum(), weights)) for y in (model(x), compiled(x))]
        torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-10)


def values_and_gradients(model, contexts, ids):
    model.zero_grad()
    with intervene(model, contexts):
        logits = model(ids).logits
        logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("contexts", [MIXED, "thick+slant=0.5", torch.rand(4, 3, dtype=torch.float64)])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "independent" not in name])
def test_the_same_comes_out_as_row_by_row(variant, contexts, without_matrices):
    model = adapted(gpt2(), alpha=2.0, **VARIANTS[variant]).double().train()
    model.eval()  # no dropout
    ids = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    logits, gradients = values_and_gradients(model, contexts, ids)
    without_matrices()
    expected, reference = values_and_gradients(model, contexts, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == reference.keys()
    assert any("causal_context_causal" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_gradient_checkpointing_too(use_reentrant, without_matrices):
    model = adapted(gpt2(), mechanism="reduced").double().train()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    logits, gradients = values_and_gradients(model, MIXED, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again, checkpointed = values_and_gradients(model, MIXED, ids)
    torch.testing.assert_close(again, logits, rtol=1e-10, atol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_a_part_that_computes_without_gradients_first_still_trains():
    model = adapted(mechanism="reduced").double().train()
    x = torch.randn(4, 2, 10, dtype=torch.float64)
    expected = torch.autograd.grad(model(x, context=MIXED).sum(), [p for p in model.parameters() if p.requires_grad])
    output = checkpoint(lambda x: model(x, context=MIXED), x.requires_grad_(), use_reentrant=True)
    output.sum().backward()
    for parameter, gradient in zip([p for p in model.parameters() if p.requires_grad], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("shape", "contexts", "width", "made"),
    [
        ((4, 2, 10), MIXED, 4, 2),
        ((4, 10), MIXED, 4, 0),  # a row is one vector
        ((4, 10), "thick", 1, 0),
        ((40, 10), "thick", 4, 2),  # but all have the same matrix
        ((4, 2, 10), MIXED, 64, 0),
    ],
)
def test_on_a_cpu_matrices_are_made_for_layers_with_enough_tokens(shape, contexts, width, made, monkeypatch):
    found = []
    monkeypatch.setattr(hooks, "causal_matrices", lambda *args: found.append(causal_matrices(*args)) or found[-1])
    model = adapted(mechanism="structural", concept_rank=width).train()
    model(torch.randn(shape), context=contexts).sum().backward()
    assert len(found[0]) == made


def test_under_autocast_wide_layers_lose_no_more_than_one_rounding():
    model = adapted(mechanism="structural", concepts=tuple("abcdefghijklmnopqrst"), concept_rank=8).train()
    x = torch.randn(4, 2, 10, generator=torch.Generator().manual_seed(0))
    contexts = ["a", (), "b+c", {"d": 0.5}]
    expected = model(x, context=contexts)
    with torch.autocast("cpu", torch.bfloat16):
        given = model(x, context=contexts)
    assert (given - expected).norm() < 2**-7 * expected.norm()


def test_on_other_devices_they_are_made_for_any_number_of_tokens():
    model = adapted(mechanism="reduced").to("meta")
    layers = list(adapted_layers(model).values())
    assert len(causal_matrices(layers, "default", torch.zeros(4, 4, device="meta"), tokens=4)) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_wide_layers_give_compiled_what_they_give_uncompiled():
    model = adapted(mechanism="structural", concept_rank=64).double().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 7, 300):
        x = torch.randn(4, tokens, 10, dtype=torch.float64)
        with intervene(model, MIXED):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)


def test_a_call_of_generate_makes_its_matrices_once(monkeypatch):
    made = []
    original = hooks.causal_matrices
    monkeypatch.setattr(hooks, "causal_matrices", lambda *args: made.append(args) or original(*args))
    # So wide that a forward of its own would leave them out.
    model = adapted(gpt2(), mechanism="reduced", concept_rank=64, task_type="CAUSAL_LM")
    ids = torch.tensor([[3, 4, 5]])
    for context in ("thick", "slant=3"):
        with intervene(model, context):
            output = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
            alone = [model(output[:, :n]).logits[0, -1].argmax() for n in range(3, 8)]
        assert torch.equal(output[0, 3:], torch.stack(alone))
    assert sum(len(args[2]) == 1 for args in made) == 2 * (1 + 5)
