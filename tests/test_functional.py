"""The equations against matrices written by hand, for three concepts of width one; float64."""

import pytest
import torch

from hf_causal_context import functional as F

EXACT = {"rtol": 0, "atol": 1e-10}
B12, B13, B21, B23, B31, B32 = 0.2, -0.3, 0.5, 0.7, -1.1, 1.3
J12, J13, J21, J23, J31, J32 = 2.0, 3.0, 5.0, 7.0, 11.0, 13.0
OBSERVATIONAL = torch.tensor([[0, B12, B13], [B21, 0, B23], [B31, B32, 0]], dtype=torch.float64)
INTERVENTIONAL = torch.tensor([[0, J12, J13], [J21, 0, J23], [J31, J32, 0]], dtype=torch.float64)
# 1 -> 2 -> 3 and 1 -> 3
DIRECT = torch.tensor([[0, 0, 0], [B21, 0, 0], [B31, B32, 0]], dtype=torch.float64)


def mask(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def apply_by_hand(matrix, z):
    return z @ torch.tensor(matrix, dtype=torch.float64).T


@pytest.fixture
def z():
    return torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def reduced(e, m, perfect=True):
    return F.reduced(e, m, OBSERVATIONAL, INTERVENTIONAL, perfect_interventions=perfect)


def structural(e, m, steps=2, perfect=True):
    return F.structural(e, m, DIRECT, steps=steps, perfect_interventions=perfect)


def test_independent(z):
    expected = apply_by_hand([[0, 0, 0], [0, 1, 0], [0, 0, -0.5]], z)
    torch.testing.assert_close(F.independent(z, mask([0, 1, -0.5])), expected, **EXACT)


def test_intervened_is_linear_in_the_strength(z):
    shift = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64).view(3, 1, 1)
    expected = apply_by_hand([[1, 0, 0], [0, 1 + 3, 0], [0, 0, 1 - 0.5 * 4]], z)
    torch.testing.assert_close(F.intervened(z, mask([0, 1, -0.5]), shift), expected, **EXACT)


@pytest.mark.parametrize(
    ("m", "perfect", "matrix"),
    [
        ((0, 0, 0), True, [[1, B12, B13], [B21, 1, B23], [B31, B32, 1]]),
        ((0, 1, 0), True, [[1, J12, B13], [0, 1, 0], [B31, J32, 1]]),
        ((0, 1, 0), False, [[1, J12, B13], [0, 1, 0], [B31, J32, 1]]),
        ((1, 1, 0), True, [[1, 0, 0], [0, 1, 0], [J31, J32, 1]]),
        # as published: targets of a joint intervention keep the interventional columns of the other targets
        ((1, 1, 0), False, [[1, J12, 0], [J21, 1, 0], [J31, J32, 1]]),
        ((1, 1, 1), True, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ((0, 0.5, 0), True, [[1, (B12 + J12) / 2, B13], [B21 / 2, 1, B23 / 2], [B31, (B32 + J32) / 2, 1]]),
        ((0, 2.0, 0), True, [[1, J12, B13], [0, 1, 0], [B31, J32, 1]]),
        ((0, -1.0, 0), True, [[1, B12, B13], [B21, 1, B23], [B31, B32, 1]]),
    ],
)
def test_reduced(z, m, perfect, matrix):
    torch.testing.assert_close(reduced(z, mask(m), perfect), apply_by_hand(matrix, z), **EXACT)


@pytest.mark.parametrize(
    ("m", "matrix"),
    [
        ((0, 0, 0), [[1, 0, 0], [B21, 1, 0], [B31 + B32 * B21, B32, 1]]),
        ((1, 0, 0), [[1, 0, 0], [B21, 1, 0], [B31 + B32 * B21, B32, 1]]),
        ((0, 1, 0), [[1, 0, 0], [0, 1, 0], [B31, B32, 1]]),
        ((0, 0, 1), [[1, 0, 0], [B21, 1, 0], [0, 0, 1]]),
        ((0, 1, 1), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ((0, 3.0, 0), [[1, 0, 0], [0, 1, 0], [B31, B32, 1]]),
        ((0, 0.5, 0), [[1, 0, 0], [B21 / 2, 1, 0], [B31 + B32 * B21 / 2, B32, 1]]),
    ],
)
def test_structural(z, m, matrix):
    torch.testing.assert_close(structural(z, mask(m)), apply_by_hand(matrix, z), **EXACT)


def test_imperfect_structural_interventions_cut_nothing(z):
    torch.testing.assert_close(structural(z, mask([0, 1, 1]), perfect=False), structural(z, mask([0, 0, 0])), **EXACT)


def test_structural_solves_its_equation_with_enough_steps_only(z):
    c, m = structural(z, mask([0, 0, 0])), mask([0, 0, 0])
    torch.testing.assert_close(c, z + c @ DIRECT.T, **EXACT)
    assert (structural(z, m, steps=1) - c).abs().max() > 1e-3


@pytest.mark.parametrize("mechanism", [reduced, structural])
@pytest.mark.parametrize("strength", [1.0, 1.7])
def test_an_intervened_concept_listens_to_nobody(z, mechanism, strength):
    for target in range(3):
        m = torch.zeros(1, 3, dtype=torch.float64)
        m[0, target] = strength
        jacobian = torch.autograd.functional.jacobian(lambda e, m=m: mechanism(e, m)[0, 0], z[:, :1])[:, 0, 0]
        others = [k for k in range(3) if k != target]
        assert torch.equal(jacobian[target, others], torch.zeros(2, dtype=torch.float64))
        assert jacobian[target, target] == 1


def test_a_mixed_batch_equals_single_rows(z):
    rows = mask([0, 0, 0], [0, 1, 0], [1, 0.5, 2], [-1, 0, 1])
    batch = z.expand(4, -1, -1) * torch.arange(1, 5).view(4, 1, 1)
    for mechanism in (F.independent, reduced, structural):
        together = mechanism(batch, rows)
        apart = torch.cat([mechanism(batch[i : i + 1], rows[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(together, apart, **EXACT)


def test_features_are_grouped_concept_by_concept():
    m = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(
        F.per_feature(m, torch.empty(2, 7, 6)), torch.tensor([[[1.0, 1, 1, 2, 2, 2]], [[3.0, 3, 3, 4, 4, 4]]])
    )
    blocks = torch.tensor([[[0.0, 1], [1, 0]], [[2.0, 0], [0, 3]]])
    assert torch.equal(F.block_linear(torch.tensor([[1.0, 2, 3, 4]]), blocks), torch.tensor([[2.0, 1, 6, 12]]))


def test_expressive_maps_never_mix_concepts():
    blocks = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.ones(1, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: F.expressive(x, blocks)[0], x)[:, 0]
    same_concept = torch.block_diag(*[torch.ones(2, 2)] * 3).bool()
    assert (jacobian[~same_concept] == 0).all()
    assert (jacobian[same_concept] != 0).all()


def test_acyclicity_penalty_is_zero_only_without_cycles():
    assert F.acyclicity_penalty(DIRECT, 3).abs() < 1e-12
    cyclic = DIRECT.clone()
    cyclic[0, 2] = 0.1
    assert F.acyclicity_penalty(cyclic, 3) > 1e-3


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_block_map_applies_every_map_to_its_own_concept():
    x, blocks = random(5, 3, 2), random(3, 4, 2)
    expected = torch.stack([torch.stack([blocks[k] @ x[b, k] for k in range(3)]) for b in range(5)])
    torch.testing.assert_close(F.block_map(x, blocks), expected, **EXACT)
    torch.testing.assert_close(F.block_map(x, blocks).flatten(1), x.flatten(1) @ torch.block_diag(*blocks).T, **EXACT)


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 4, 2), (1, 2, 5), (4, 1, 1)])
def test_diagonal_blocks(shape):
    blocks = random(*shape)
    matrix = torch.block_diag(*blocks)
    assert torch.equal(F.diagonal_blocks(matrix, shape[0]), blocks)
    outside = torch.block_diag(*torch.ones(shape)) == 0
    assert torch.equal(F.diagonal_blocks(matrix + 7 * outside, shape[0]), blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_intervenable_is_linear_in_the_strength(dtype):
    z = random(1, 3, 1)
    observational, interventional = torch.tensor([[2.0, 3, 4], [20.0, 30, 40]], dtype=torch.float64).view(2, 3, 1, 1)
    m = torch.tensor([[0, 1, -0.5], [2, 0.5, 0], [0, 0, 0], [1, 1, 1]], dtype=dtype)
    factors = torch.tensor([[2, 30, -14], [38, 16.5, 4], [2, 3, 4], [20, 30, 40]], dtype=torch.float64)
    output = F.intervenable(z.expand(4, -1, -1), m, observational, interventional)
    torch.testing.assert_close(output[..., 0], factors * z[..., 0], **EXACT)


def test_intervenable_maps_between_widths_and_serves_a_batch_by_one_mask():
    z, (observational, interventional), m = random(5, 3, 2), random(2, 3, 4, 2), mask([0, 1, 0.5])
    expected = torch.stack((observational[0], interventional[1], (observational[2] + interventional[2]) / 2))
    output = F.intervenable(z, m, observational, interventional)
    torch.testing.assert_close(output, torch.einsum("koi,bki->bko", expected, z), **EXACT)
    assert torch.equal(output, F.intervenable(z, m.expand(5, -1), observational, interventional))


def test_group_norm_adds_the_sizes_of_blocks():
    weight = torch.tensor([[0, 0, 3, 0], [0, 0, 0, -4], [1, 2, 0, 0], [2, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(F.group_norm(weight, 2), torch.tensor(5 + 3.0, dtype=torch.float64), rtol=0, atol=1e-5)
    weight = random(6, 6)
    blocks = [weight[i : i + 2, j : j + 2].norm() for i in (0, 2, 4) for j in (0, 2, 4)]
    torch.testing.assert_close(F.group_norm(weight, 3), sum(blocks), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_norm_of_zeros_is_zero_and_has_a_finite_gradient(dtype):
    weight = torch.zeros(6, 6, dtype=dtype, requires_grad=True)
    norm = F.group_norm(weight, 3)
    norm.backward()
    assert norm.abs() < 1e-10
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    alone = torch.zeros(6, 6, dtype=dtype)
    alone[4, 1] = -0.5
    F.group_norm(alone.requires_grad_(), 3).backward()
    torch.testing.assert_close(alone.grad, alone.detach().sign())
