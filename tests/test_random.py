"""Draws by a seed, which leave no trace in what others draw."""

from __future__ import annotations

import pytest
import torch

from hf_causal_context._random import seeded


def test_draws_follow_the_seed_and_leave_the_random_state_as_it_was():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.rand(4), first)


def test_without_a_seed_draws_go_on_from_the_present_state():
    with seeded(None):
        first = torch.rand(4)
    assert torch.equal(torch.rand(4), first)


def test_gpus_that_nothing_is_drawn_on_are_not_seeded(monkeypatch: pytest.MonkeyPatch):
    # Their states would stay changed: a training draws its dropout from them.
    reached = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reached.append)
    with seeded(3):
        torch.rand(4)
    assert reached == []
