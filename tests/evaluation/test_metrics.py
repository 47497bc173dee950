"""Distances and intervals against their known values."""

import pytest
import torch

from hf_causal_context.evaluation.comparison import compare, gap_closed
from hf_causal_context.evaluation.metrics import Estimate, mean_pairwise_distance, sliced_wasserstein


def test_a_set_has_no_distance_from_itself_in_any_order():
    x = torch.randn(50, 1, 4, 4)
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-6)


def test_a_shift_has_its_length_over_the_root_of_the_dimension():
    x, shift = torch.randn(100, 16), torch.randn(16)
    expected = float(shift.norm() / 4)  # the root of the mean of (direction . shift)^2
    assert sliced_wasserstein(x + shift, x) == pytest.approx(expected, rel=0.1)
    assert sliced_wasserstein(x + 2 * shift, x) == pytest.approx(2 * sliced_wasserstein(x + shift, x), rel=1e-6)


def test_it_is_deterministic_and_takes_sets_of_other_sizes():
    x, y = torch.randn(30, 2, 3), torch.randn(70, 2, 3)
    assert sliced_wasserstein(x, y) == sliced_wasserstein(x, y)
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(y, x), rel=1e-6)


@pytest.mark.parametrize("other", [torch.zeros(3, 5), torch.zeros(0, 4)])
def test_other_shapes_are_an_error(other):
    with pytest.raises(ValueError, match="cannot be compared with a reference of shape"):
        sliced_wasserstein(torch.zeros(3, 4), other)


def test_values_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="contain NaN or infinite values"):
        sliced_wasserstein(torch.full((2, 3), float("nan")), torch.zeros(2, 3))


def test_an_interval_is_that_of_the_t_distribution():
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert estimate.mean == 2.5
    # 3.1824 is t(0.975) with 3 degrees of freedom, 1.2910 the sample deviation
    assert estimate.half_width == pytest.approx(3.1824 * 1.2910 / 2, rel=1e-4)
    assert Estimate.of([1.5]) == Estimate(1.5, None)


def test_floor_and_reference_are_disjoint_and_the_gap_is_their_ratio():
    real = torch.tensor([[0.0], [1.0]])
    distances = compare([torch.tensor([[0.5]])], [torch.tensor([[-3.0]])], real, num=1, seed=0)
    assert distances.floor.mean == pytest.approx(1)
    assert distances.samples.mean == pytest.approx(0.5)
    assert distances.base.mean in (pytest.approx(3), pytest.approx(4))
    assert distances.gap_closed == pytest.approx((distances.base.mean - 0.5) / (distances.base.mean - 1))
    assert gap_closed(0.5, 1.0, 1.05) is None, "the base is at the floor"


def test_every_seed_group_has_another_split_of_the_real_rows():
    rows = torch.arange(20.0)[:, None]
    distances = compare([rows[:5]] * 2, [rows[:5]] * 2, rows, num=5, seed=0)
    assert distances.samples.half_width > 0


def test_mean_pairwise_distance():
    assert mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx(10 / 3)
    assert mean_pairwise_distance(torch.zeros(2, 1, 3, 3)) == 0
