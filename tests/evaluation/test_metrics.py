"""The sliced Wasserstein distance against its known values."""

import pytest
import torch

from hf_causal_context.evaluation.metrics import sliced_wasserstein


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
