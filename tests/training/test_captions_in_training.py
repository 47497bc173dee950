"""Captions that are left out or shuffled: by the sample's own chance, so that a resumed run sees the same ones."""

from itertools import islice

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_causal_context.bases.loading import load_base
from hf_causal_context.data import from_dataset
from hf_causal_context.errors import UserValueError
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.batches import DenoiserBatches
from hf_causal_context.training.denoiser.captions import changed_captions
from hf_causal_context.training.finetune import train

from .small import CONTEXTS, adapter_weights, settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")
SLOTS = range(4000)


@pytest.fixture
def given(tmp_path):
    def given(base="base", root="data", **changes):
        return TrainingArguments(**settings(base, root, tmp_path / "out", **changes))

    return given


@pytest.fixture
def tagged():
    """Rows with tags, each caption another one."""
    contexts = [context for context in CONTEXTS for _ in range(4)]
    rows = {
        "image": [Image.new("RGB", (16, 16), (20 * i, 0, 0)) for i in range(len(contexts))],
        "context": contexts,
        "text": [f"a{i} , b,c" for i in range(len(contexts))],
    }
    return Dataset.from_dict(rows).cast_column("image", ImageFeature())


@pytest.fixture
def batches(given, tagged, pipeline_folder):
    """A function: batches of the tagged rows, and the captions that the base was given, one list for each batch."""

    def make(streaming=False, caption_column="text", rank=0, world_size=1, rows=tagged, **changes):
        rows = rows.to_iterable_dataset() if streaming else rows
        concepts = ("slant", "thick") if streaming else None
        data = from_dataset(rows, caption_column=caption_column, concepts=concepts)
        folder = pipeline_folder("stable_diffusion")
        base = load_base(folder)
        arguments = given(folder, **changes)
        made = DenoiserBatches(base, data, arguments, 20, torch.device("cpu"), rank, world_size)
        seen = []
        conditions = made._conditions
        made._conditions = lambda columns: seen.append(columns.get("caption")) or conditions(columns)
        return made, seen

    return make


def test_the_share_of_empty_captions_is_the_one_that_was_given(given):
    captions = list(changed_captions(["a, b"] * len(SLOTS), SLOTS, given(caption_dropout=0.1)))
    assert captions.count("") / len(SLOTS) == pytest.approx(0.1, abs=0.015)
    assert set(captions) == {"", "a, b"}


def test_every_order_of_tags_comes_equally_often(given):
    captions = list(changed_captions(["a, b,  c d"] * len(SLOTS), SLOTS, given(shuffle_tags=True)))
    orders = ("a, b, c d", "a, c d, b", "b, a, c d", "b, c d, a", "c d, a, b", "c d, b, a")
    assert set(captions) == set(orders)
    assert all(captions.count(order) / len(SLOTS) == pytest.approx(1 / 6, abs=0.02) for order in orders)


def test_what_is_decided_depends_on_the_seed_and_the_slot_alone(given):
    arguments = given(caption_dropout=0.5, shuffle_tags=True)
    whole = list(changed_captions(["a, b, c"] * 40, range(40), arguments))
    assert list(changed_captions(["a, b, c"] * 10, range(17, 27), arguments)) == whole[17:27]
    assert (
        list(changed_captions(["a, b, c"] * 40, range(40), given(caption_dropout=0.5, shuffle_tags=True, seed=1)))
        != whole
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_have_the_changed_captions_and_the_noise_that_they_had(streaming, batches):
    changed, seen = batches(streaming, caption_dropout=0.3, shuffle_tags=True, train_batch_size=4)
    plain, before = batches(streaming, train_batch_size=4)
    for actual, expected in islice(zip(changed(0), plain(0), strict=True), 8):
        assert torch.equal(actual.clean, expected.clean)
        assert torch.equal(actual.draws.normal(3), expected.draws.normal(3))
        encoded = changed._base.encode_captions(seen[-1])["encoder_hidden_states"]
        torch.testing.assert_close(actual.conditions["encoder_hidden_states"], encoded)
    assert {"" in captions for captions in seen} == {True, False}
    for captions, originals in zip(seen, before, strict=False):
        for caption, original in zip(captions, originals, strict=True):
            assert not caption or sorted(caption.split(", ")) == sorted(tag.strip() for tag in original.split(","))


def test_a_caption_that_is_missing_in_a_stream_is_named(batches, tagged):
    texts = tagged["text"][:]
    texts[5] = None
    made, _ = batches(streaming=True, rows=tagged.remove_columns("text").add_column("text", texts))
    with pytest.raises(UserValueError, match="A row of the context 'slant' has no caption. Write one, '' for none"):
        list(islice(made(0), 20))


def test_two_processes_share_the_captions_of_one(batches):
    changes = {"caption_dropout": 0.3, "shuffle_tags": True}
    whole, seen = batches(train_batch_size=4, **changes)
    parts = [batches(rank=rank, world_size=2, train_batch_size=2, **changes) for rank in range(2)]
    for made in (whole, *(part for part, _ in parts)):
        list(islice(made(0), 4))
    assert seen == [first + second for first, second in zip(parts[0][1], parts[1][1], strict=True)]


def test_the_empty_caption_is_encoded_before_the_encoders_leave_the_device(batches):
    made, _ = batches(caption_dropout=0.5)
    made._base.encode_captions = None
    assert len(list(islice(made(0), 8))) == 8


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(pipeline_folder, tmp_path):
    root = write_folders(tmp_path / "data")
    given = settings(
        pipeline_folder("stable_diffusion"),
        root,
        tmp_path / "whole",
        instance_prompt="a, b, c",
        caption_dropout=0.3,
        shuffle_tags=True,
        max_train_steps=4,
        checkpointing_steps=2,
    )
    train(TrainingArguments(**given))
    train(TrainingArguments(**given | {"output_dir": str(tmp_path / "cut"), "max_train_steps": 2}))
    resumed = given | {"output_dir": str(tmp_path / "cut"), "resume_from_checkpoint": "latest"}
    train(TrainingArguments(**resumed))
    whole = adapter_weights(tmp_path / "whole")
    for name, tensor in adapter_weights(tmp_path / "cut").items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_dropout": 1.0}, "--caption_dropout=1.0 must be at least 0 and below 1: the share of captions"),
        ({"caption_dropout": float("nan")}, "--caption_dropout=nan must be"),
        (
            {"caption_dropout": 0.1, "caption_column": None},
            "--caption_dropout: the images have no captions to change. Caption",
        ),
        ({"shuffle_tags": True, "caption_column": None}, "--shuffle_tags: the images have no captions to change"),
        (
            {"shuffle_tags": True, "caption_column": None, "instance_prompt": "a face"},
            "no caption has a comma, such as 'a face'. Put commas between the tags, or leave it out.",
        ),
    ],
)
def test_what_would_change_nothing_is_refused(changes, message, batches):
    with pytest.raises(ValueError, match=message):
        batches(**changes)
