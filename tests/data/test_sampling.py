from collections import Counter
from itertools import islice

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset

from hf_causal_context.data import ContextSampler, from_dataset, load_folders, stream_batches
from hf_causal_context.data.sampling import schedule
from tests.data.small import write_folders

CONTEXTS = ["a"] * 5 + [""] * 13 + ["b"] * 7 + ["a"] * 2


def sampler(batch_size=4, seed=0, num_batches=50, contexts=CONTEXTS, **options):
    return ContextSampler(contexts, batch_size, seed, num_batches, **options)


def drawn(batches):
    return [row for batch in batches for row in batch]


def test_the_same_seed_gives_the_same_rows():
    assert list(sampler()) == list(sampler())
    assert list(sampler()) != list(sampler(seed=1))
    twice = sampler()
    assert list(twice) == list(twice)
    assert drawn(sampler(batch_size=4)) == drawn(sampler(batch_size=2, num_batches=100))


@pytest.mark.parametrize("weights", [None, {"a": 3, "": 0.7}])
@pytest.mark.parametrize("start", [0, 1, 17, 49, 50])
def test_resuming_equals_skipping(start, weights):
    resumed = sampler(start=start, weights=weights)
    assert list(resumed) == list(sampler(weights=weights))[start:]
    assert len(resumed) == 50 - start


def test_any_consecutive_slots_hold_all_contexts():
    contexts = [CONTEXTS[row] for row in drawn(sampler())]
    assert all(len(set(contexts[slot : slot + 3])) == 3 for slot in range(len(contexts) - 2))


def test_within_a_context_every_row_is_drawn_before_any_is_drawn_again():
    rows = [row for row in drawn(sampler()) if CONTEXTS[row] == "b"]
    epochs = [rows[first : first + 7] for first in range(0, len(rows) - 6, 7)]
    assert all(sorted(epoch) == list(range(18, 25)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)


@pytest.mark.parametrize("weights", [None, {"b": 2.5}])
def test_two_processes_equal_one_with_the_doubled_batch(weights):
    one = sampler(batch_size=8, num_batches=20, weights=weights)
    two = [sampler(batch_size=4, num_batches=20, rank=rank, world_size=2, weights=weights) for rank in range(2)]
    for whole, *halves in zip(one, *two, strict=True):
        assert drawn(halves) == whole
    for batch in range(20):
        assert [*two[0].slots(batch), *two[1].slots(batch)] == list(one.slots(batch))


def test_weights_are_exact_shares():
    weights = {"a": 1, "b": 0, "": 3}
    contexts = [CONTEXTS[row] for row in drawn(sampler(num_batches=100, weights=weights))]
    assert Counter(contexts) == {"a": 100, "": 300}
    for slot in range(0, 400, 4):
        assert Counter(contexts[slot : slot + 4]) == {"a": 1, "": 3}


def test_contexts_without_a_weight_have_weight_one():
    contexts = ["x", "y", "w+z"]
    rows = drawn(sampler(contexts=contexts, num_batches=10, weights={"z+w": 2}))
    assert Counter(rows) == {0: 10, 1: 10, 2: 20}


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.7, 0.2, 0.1], [0.0, 1 / 3, 2 / 3], [1.0], [0.001, 0.499, 0.5]])
def test_the_schedule_of_any_part_is_part_of_the_schedule(shares):
    shares = torch.tensor(shares, dtype=torch.float64).numpy()
    contexts, draws = schedule(shares, 0, 3000)
    for first, last in ((0, 1), (5, 9), (999, 1003), (2990, 3000)):
        part_contexts, part_draws = schedule(shares, first, last)
        assert part_contexts.tolist() == contexts[first:last].tolist()
        assert part_draws.tolist() == draws[first:last].tolist()
    for context, share in enumerate(shares):
        own = draws[contexts == context]
        assert own.tolist() == list(range(len(own)))
        assert abs(len(own) - 3000 * share) < len(shares)


def test_one_million_rows():
    contexts = ["", "a", "b", "c"] * 250_000
    batches = list(sampler(contexts=contexts, num_batches=100, start=90, batch_size=16))
    assert len(set(drawn(batches))) == 160


def test_works_as_a_batch_sampler():
    loader = torch.utils.data.DataLoader(range(100, 127), batch_sampler=sampler(num_batches=3))
    assert [batch.tolist() for batch in loader] == [[100 + row for row in batch] for batch in sampler(num_batches=3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": []}, "No rows to sample from: contexts= is empty"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 and start=0 must not be negative"),
        ({"start": -1}, "start=-1 must not be negative"),
        ({"start": 51}, "num_batches=50 must be at least start=51"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be 0 to world_size - 1"),
        ({"world_size": 0}, "world_size=0 at least 1"),
        ({"weights": {"c": 1}}, "weights= names 'c', which has no rows. Contexts of the rows: '', 'a', 'b'"),
        ({"weights": {"a": -1}}, "none negative and not all zero"),
        ({"weights": {"a": float("nan")}}, "must be finite numbers"),
        ({"weights": {"a": 0, "b": 0, "": 0}}, "not all zero: each is the relative share of a context"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


# Streams


@pytest.fixture(params=["folders", "table"])
def stream(request, tmp_path):
    root = write_folders(tmp_path / "data", {"obs": 5, "a": 4, "b": 3})
    if request.param == "folders":
        return load_folders(root, streaming=True)
    table = load_folders(root).rows.to_iterable_dataset(num_shards=3)
    return from_dataset(table, concepts=("a", "b"))


def batches(stream, count, *arguments, **options):
    return [
        [(row["context"], row["image"].tobytes()) for row in batch]
        for batch in islice(stream_batches(stream, *arguments, **options), count)
    ]


def test_a_stream_is_the_same_after_a_restart(stream):
    whole = batches(stream, 12, 4, 0)
    assert batches(stream, 12, 4, 0) == whole
    assert batches(stream, 12, 4, 1) != whole
    assert batches(stream, 5, 4, 0, start=7) == whole[7:]
    weighted = batches(stream, 12, 4, 0, weights={"a": 3})
    assert batches(stream, 5, 4, 0, start=7, weights={"a": 3}) == weighted[7:]


def test_a_stream_is_balanced_endless_and_shuffled_in_every_epoch(stream):
    rows = drawn(batches(stream, 10, 6, 0))
    assert Counter(context for context, _ in rows) == {"": 20, "a": 20, "b": 20}
    epochs = [tuple(image for context, image in rows if context == "a")[first : first + 4] for first in range(0, 20, 4)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert len(set(epochs)) > 1


def test_processes_of_a_stream_share_its_batches(stream):
    whole = batches(stream, 12, 4, 0)
    assert batches(stream, 6, 4, 0, rank=0, world_size=2) == whole[0::2]
    assert batches(stream, 3, 4, 0, start=3, rank=1, world_size=2) == whole[7::2]


def test_stream_rows_are_whole(stream):
    row = next(stream_batches(stream, 1, 0))[0]
    assert set(row) == {"image", "context"}
    assert isinstance(row["image"], PIL.Image.Image)


def test_bad_streams(stream):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        stream_batches(stream, 0, 0)
    with pytest.raises(ValueError, match="weights= names 'c'"):
        stream_batches(stream, 1, 0, weights={"c": 1})
    table = Dataset.from_dict({"image": [1], "context": ["a"]})
    with pytest.raises(TypeError, match="not streaming. Use ContextSampler, or load it with streaming=True"):
        stream_batches(from_dataset(table), 1, 0)
    lacking = from_dataset(table.to_iterable_dataset(), concepts=("a",))
    with pytest.raises(ValueError, match="The stream has no rows of the context ''"):
        next(stream_batches(lacking, 2, 0))


@pytest.mark.parametrize("weights", [None, {"": 3.0, "b": 0.5}])
def test_the_first_slots_are_observational_and_the_schedule_begins_after_them(weights):
    contexts = np.repeat(["", "a", "b"], 50)
    sampler = ContextSampler(contexts, 1, 0, 0, weights=weights, num_observational=40)
    plain = ContextSampler(contexts, 1, 0, 0, weights=weights)
    rows = sampler.rows(range(200))
    assert (contexts[rows[:40]] == "").all()
    assert (contexts[rows[40:]] == contexts[plain.rows(range(160))]).all()
    others = [row for row in rows[40:] if contexts[row]]
    assert others == [row for row in plain.rows(range(160)) if contexts[row]]
    observational = [row for row in rows if not contexts[row]]
    assert sorted(observational[:50]) == list(range(50))  # each once before any comes again
    for first, last in ((0, 7), (37, 44), (40, 41), (100, 200)):
        assert sampler.rows(range(first, last)) == rows[first:last]


def test_observational_slots_need_observational_rows():
    with pytest.raises(ValueError, match="num_observational=3 must be 0 or more, and 0 where there are no observ"):
        ContextSampler(["a", "b"], 2, 0, 1, num_observational=3)
