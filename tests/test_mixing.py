"""The matrices of many layers at once are the equations of `functional`, row by row: values and gradients."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_causal_context import functional
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.functional import _sum_of_powers, fewest_doublings
from hf_causal_context.layers import ConceptGraph, ReducedLayer, StructuralLayer

CONCEPTS = ConceptSet(("a", "b", "c", "d"))
GRAPHS = {"all": None, "chain": (("a", "b"), ("b", "c"), ("c", "d")), "none": ()}


def row_by_row(layer, z, mask):
    """As few tokens are computed."""
    return torch.stack([layer(row[None], m[None])[0] for row, m in zip(z, mask, strict=True)])


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("cls", "perfect", "anchored", "part"),
    list(itertools.product((ReducedLayer, StructuralLayer), (True, False), (True, False), (0, 3))),
)
def test_they_are_what_the_layers_compute(cls, perfect, anchored, part, graph):
    options = {"perfect_interventions": perfect, "anchored": anchored, "observational_rank": part, "identity": False}
    layers = [cls(4, 2, ConceptGraph(CONCEPTS, GRAPHS[graph]), **options).double() for _ in range(3)]
    mask = torch.randn(5, 4 + (part > 0), dtype=torch.float64)
    mask[0] = 0
    z = torch.randn(5, 2, 8 + part, dtype=torch.float64)
    matrices = cls.matrices(layers, mask)
    for layer, made in zip(layers, matrices, strict=True):
        expected = row_by_row(layer, z, mask)
        torch.testing.assert_close(z @ made, expected, rtol=1e-10, atol=1e-10)
        weights = list(layer.parameters())
        # Of no steps, the coefficients are in neither.
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        given, reference = (torch.autograd.grad(y.square().sum(), weights, **options) for y in (z @ made, expected))
        for gradient, other in zip(given, reference, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)
    if anchored:
        assert not matrices[:, 0, part:, part:].any()


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("steps", [*range(10), 62, 63, 64])
def test_a_sum_of_powers_is_what_so_many_substitutions_give(steps, tokens):
    e, effects = torch.randn(2, 5, tokens, dtype=torch.float64), 0.2 * torch.randn(2, 5, 5, dtype=torch.float64)
    expected = e
    for _ in range(steps):
        expected = e + effects @ expected
    given = _sum_of_powers(e, effects @ e, effects, steps)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)


def test_doublings_are_as_many_as_pay_for_so_many_tokens():
    assert [fewest_doublings(63, tokens, 256) for tokens in (1, 16, 32, 64, 256)] == [0, 1, 2, 3, 4]
    assert [fewest_doublings(steps, 256, 256) for steps in (0, 1, 3, 5)] == [0, 0, 0, 1]


def wide(**options):
    torch.manual_seed(0)
    concepts = ConceptSet(tuple(f"c{k}" for k in range(16)))
    return StructuralLayer(16, 2, ConceptGraph(concepts), observational_rank=3, identity=False, **options).double()


def step_by_step(layer, z, mask, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(functional, "fewest_doublings", lambda *sizes: 0)
        return layer._with_observational_part(z, functional.per_feature(mask, z, 3))


@pytest.mark.parametrize("contexts", ["one", "of rows"])
@pytest.mark.parametrize("tokens", [1, 2, 8, 40])
@pytest.mark.parametrize("options", [{}, {"perfect_interventions": False}, {"anchored": True}])
def test_concepts_in_circles_are_what_single_steps_give_by_every_route(options, tokens, contexts, monkeypatch):
    layer = wide(**options)
    mask = torch.randn(1 if contexts == "one" else 4, 17, dtype=torch.float64)
    mask[0, 1:9] = torch.tensor([0, 1, 0.5, 0, 2, -1, 0, 1])
    z = torch.randn(4, tokens, 35, dtype=torch.float64, requires_grad=True)
    pairs = []
    for y in (layer(z, mask), step_by_step(layer, z, mask, monkeypatch)):
        pairs.append((y, torch.autograd.grad(y.square().mean(), (z, *layer.parameters()))))
    torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-10)


def products(run):
    """Floating-point operations of its products of matrices."""
    with FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


@pytest.mark.parametrize("tokens", [1, 8, 16, 32, 64, 256])
def test_any_number_of_tokens_takes_at_most_a_tenth_more_than_the_better_route(tokens, monkeypatch):
    layer, z, mask = wide(), torch.randn(4, tokens, 35, dtype=torch.float64), torch.ones(4, 17, dtype=torch.float64)
    steps = products(lambda: step_by_step(layer, z, mask, monkeypatch))
    matrices = products(lambda: functional.row_linear(z, type(layer).matrices([layer], mask)[0]))
    assert products(lambda: layer(z, mask)) <= 1.1 * min(steps, matrices)
