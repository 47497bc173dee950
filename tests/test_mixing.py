"""The matrices of many layers at once are the equations of `functional`, row by row: values and gradients."""

import itertools

import pytest
import torch

from hf_causal_context.contexts import ConceptSet
from hf_causal_context.functional import _geometric_sum
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


@pytest.mark.parametrize("steps", range(10))
def test_a_sum_of_powers_in_few_products(steps):
    matrix = 0.5 * torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = sum(torch.linalg.matrix_power(matrix, power) for power in range(steps + 1))
    torch.testing.assert_close(_geometric_sum(matrix, steps), expected)
