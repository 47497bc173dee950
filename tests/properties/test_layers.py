"""The equations on random small shapes against dense matrices; float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_causal_context import functional as F
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.layers import ConceptGraph, IndependentLayer, ReducedLayer, StructuralLayer

from .cases import cases

EXACT = {"rtol": 1e-9, "atol": 1e-10}
STRENGTHS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, -0.5, 1.7])


@st.composite
def problems(draw):
    """Shapes, a mask with a row per sample, features, and a source of random weights."""
    K, W = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    middle = draw(st.lists(st.integers(1, 3), max_size=2))
    B = draw(st.integers(1, 4))
    mask = torch.tensor(draw(st.lists(st.lists(STRENGTHS, min_size=K, max_size=K), min_size=B, max_size=B)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return K, W, mask.double(), random(B, *middle, K * W), random


def blocks(matrix_KK, W):
    return torch.kron(matrix_KK.double(), torch.ones(W, W, dtype=torch.float64))


def dense(matrices, z):
    """A matrix of its own for every sample."""
    return torch.einsum("bij,b...j->b...i", torch.stack(list(matrices)), z)


def per_row(mask, W):
    return (torch.diag(row.repeat_interleave(W)) for row in mask)


@cases(150)
@given(problems())
def test_independent_and_intervened(problem):
    K, W, mask, z, random = problem
    torch.testing.assert_close(F.independent(z, mask), dense(per_row(mask, W), z), **EXACT)
    shift = random(K, W, W)
    matrices = (
        torch.eye(K * W).double() + torch.block_diag(*(m * s for m, s in zip(row, shift, strict=True))) for row in mask
    )
    torch.testing.assert_close(F.intervened(z, mask, shift), dense(matrices, z), **EXACT)
    torch.testing.assert_close(F.intervened(z, F.per_feature(mask, z), shift), F.intervened(z, mask, shift), **EXACT)


@cases(200)
@given(problems(), st.booleans())
def test_reduced(problem, perfect):
    K, W, mask, z, random = problem
    off = blocks(1 - torch.eye(K), W)
    observed, intervened = random(K * W, K * W) * off, random(K * W, K * W) * off
    one = torch.eye(K * W).double()
    matrices = []
    for q in per_row(mask.clamp(0, 1), W):
        gate = one - q if perfect else one
        matrices.append(one + (one - q) @ observed @ (one - q) + gate @ intervened @ q)
    result = F.reduced(z, mask, observed, intervened, perfect_interventions=perfect)
    torch.testing.assert_close(result, dense(matrices, z), **EXACT)


@cases(200)
@given(problems(), st.booleans(), st.data())
def test_structural_solves_its_equation(problem, perfect, data):
    K, W, mask, z, random = problem
    order = data.draw(st.permutations(range(K)))
    position = torch.tensor(order)
    acyclic = blocks(position[:, None] > position[None], W)
    A, one = random(K * W, K * W) * acyclic, torch.eye(K * W).double()
    matrices = [
        torch.linalg.inv(one - (one - q) @ A) if perfect else torch.linalg.inv(one - A)
        for q in per_row(mask.clamp(0, 1), W)
    ]
    result = F.structural(z, mask, A, steps=K - 1, perfect_interventions=perfect)
    torch.testing.assert_close(result, dense(matrices, z), rtol=1e-8, atol=1e-8)
    assert F.acyclicity_penalty(A, K).abs() < 1e-9 * (1 + A.norm() ** (2 * K))


def structural_matrix(layer, mask_row, perfect):
    W = layer.width
    one = torch.eye(layer.num_concepts * W).double()
    q = torch.diag((mask_row.clamp(0, 1) * perfect).repeat_interleave(W))
    A = layer.coefficients * blocks(layer._allowed.double()[::W, ::W], W)
    shifted = one + torch.block_diag(*(m * s for m, s in zip(mask_row, layer.shift, strict=True)))
    return torch.linalg.inv(one - (one - q) @ A) @ shifted


@cases(300)
@given(
    problems(),
    st.sampled_from([ReducedLayer, StructuralLayer, IndependentLayer]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_layers_are_linear_and_serve_every_row_alone(problem, kind, anchored, perfect, data):
    K, W, mask, z, _ = problem
    names = tuple("abcd"[:K])
    edges = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if data.draw(st.booleans())]
    graph = ConceptGraph(ConceptSet(names), edges if data.draw(st.booleans()) else None)
    if kind is IndependentLayer:
        layer = IndependentLayer(K, W)
    else:
        layer = kind(K, W, graph, perfect_interventions=perfect, anchored=anchored, identity=False)
    layer = layer.double()
    with torch.no_grad():
        together = layer(z, mask)
        for i in range(len(mask)):
            torch.testing.assert_close(layer(z[i : i + 1], mask[i : i + 1]), together[i : i + 1], **EXACT)
            matrix = layer.matrix(mask[i : i + 1])
            torch.testing.assert_close(z[i : i + 1] @ matrix.T, together[i : i + 1], **EXACT)
        if kind is StructuralLayer and graph.longest_path < K - 1:  # acyclic: the equation has one solution
            expected = dense((structural_matrix(layer, row, perfect) for row in mask), z)
            anchor = dense((structural_matrix(layer, 0 * row, perfect) for row in mask), z) if anchored else 0
            torch.testing.assert_close(together, expected - anchor, **EXACT)
        if anchored or kind is IndependentLayer:
            assert (layer(z, torch.zeros_like(mask)) == 0).all()
        if kind is not IndependentLayer and perfect:
            jacobian = layer.matrix(torch.ones(1, K).double())
            assert (jacobian[blocks(1 - torch.eye(K), W).bool()] == 0).all() or anchored


@cases(100)
@given(problems(), st.integers(1, 4))
def test_block_maps_are_block_diagonal_matrices(problem, out):
    K, W, _, z, random = problem
    square, other = random(K, W, W), random(K, out, W)
    torch.testing.assert_close(F.block_linear(z, square), z @ torch.block_diag(*square).T, **EXACT)
    x = z.reshape(-1, K, W)
    expected = x.flatten(1) @ torch.block_diag(*other).T
    torch.testing.assert_close(F.block_map(x, other).flatten(1), expected, **EXACT)
    assert torch.equal(F.diagonal_blocks(torch.block_diag(*other), K), other)
