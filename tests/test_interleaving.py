"""The benchmarks' way of timing: each variant in a process of its own, and a number from each in every round."""

import pytest

from examples.benchmarks.interleaving import interleaved, median_ratio


def worker(seconds, pipe):
    """Work whose every next round takes as much longer."""
    pipe.send(["step"])
    rounds = 0
    while pipe.recv() == "step":
        rounds += 1
        pipe.send(seconds * rounds)
    pipe.send({"rounds": rounds})


def failing(seconds, pipe):
    raise SystemExit(1)


def test_every_variant_is_timed_in_every_round_and_asked_for_its_last_words():
    seconds, results = interleaved(worker, {"slow": (2.0,), "fast": (1.0,)}, rounds=3)
    assert seconds == {"slow": {"step": [2.0, 4.0, 6.0]}, "fast": {"step": [1.0, 2.0, 3.0]}}
    assert results == {"slow": {"rounds": 3}, "fast": {"rounds": 3}}
    assert median_ratio(seconds["slow"]["step"], seconds["fast"]["step"]) == 2


def test_a_variant_that_dies_ends_the_benchmark():
    with pytest.raises(EOFError):
        interleaved(failing, {"dead": (1.0,)}, rounds=1)
