"""Data at strengths: what names say them, how batches share them, and what is refused or warned about."""

import json
from collections import Counter

import pytest
from datasets import Dataset, load_dataset

from hf_causal_context.contexts import Context
from hf_causal_context.data import check_data, from_dataset, load_folders, load_text_folders, texts_from_dataset
from hf_causal_context.data.sampling import ContextSampler, stream_batches

from .small import write_folders

COUNTS = {"obs": 3, "weight": 4, "weight=0.5": 2, "weight=0.5+slant": 1, "slant": 2}
TRAINED = {"": 3, "slant": 2, "weight": 4, "weight=0.5": 2}


def text_data(contexts, **options):
    rows = {"text": [f"text {i}" for i in range(len(contexts))], "context": list(contexts)}
    return texts_from_dataset(Dataset.from_dict(rows), **options)


def warnings_of(contexts, **options):
    return [each for each in check_data(text_data(contexts, **options)).warnings if "Fewer than" not in each]


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_images_have_strengths(tmp_path, streaming):
    data = load_folders(write_folders(tmp_path, COUNTS), streaming=streaming)
    assert (data.counts, tuple(data.concepts), list(data.held_out)) == (
        TRAINED,
        ("slant", "weight"),
        ["slant+weight=0.5"],
    )


def test_folders_and_columns_of_texts_have_strengths(tmp_path):
    for folder, count in COUNTS.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("".join(f"{folder} {i}\n" for i in range(count)))
    found = [load_text_folders(tmp_path)]
    rows = [{"text": f"{c} {i}", "context": c} for c, count in COUNTS.items() for i in range(count)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=tmp_path / "cache")
    found.append(texts_from_dataset(lines))
    for data in found:
        assert (data.counts, list(data.held_out)) == (TRAINED, ["slant+weight=0.5"])


def test_a_stream_trains_on_the_strengths_it_is_told_of_and_says_that_others_are_skipped():
    names = ("obs", "weight", "weight=0.5", "weight=0.25")
    rows = Dataset.from_dict({"text": list("abcd"), "context": names}).to_iterable_dataset()
    options = {"content_column": "text", "concepts": ["weight"]}
    data = from_dataset(rows, training_contexts=["obs", "weight", "weight=0.5"], **options)
    assert [row["context"] for row in data.rows] == ["", "weight", "weight=0.5"]
    assert "those at other strengths, too" in from_dataset(rows, **options).warnings[0]
    batch = next(stream_batches(data, 8, seed=0))
    assert Counter(row["context"] for row in batch) == {"": 4, "weight": 2, "weight=0.5": 2}


def test_strengths_of_the_same_concepts_share_one_share_in_batches():
    contexts = ["", "slant", "weight", "weight=0.25", "weight=0.5", "weight=0.75"] * 5
    sampler = ContextSampler(contexts, batch_size=24, seed=0, num_batches=1)
    drawn = Counter(contexts[row] for batch in sampler for row in batch)
    assert drawn == {"": 8, "slant": 8, "weight": 2, "weight=0.25": 2, "weight=0.5": 2, "weight=0.75": 2}
    weighted = ContextSampler(contexts, 24, 0, 1, weights={"weight=0.5": 3.25})
    drawn = Counter(contexts[row] for batch in weighted for row in batch)
    assert drawn["weight=0.5"] == 13
    assert drawn[""] == drawn["slant"] == 4


@pytest.mark.parametrize("name", ["weight=0", "weight=0+slant", "slant,weight=0.0"])
def test_a_strength_of_0_is_no_context(name, tmp_path):
    with pytest.raises(ValueError, match="'weight' at strength 0, which is no intervention.*call them 'obs'"):
        text_data(["obs", name, "weight"])
    with pytest.raises(ValueError, match=r"at strength 0.*Rename the folder"):
        load_folders(write_folders(tmp_path, {"obs": 1, name: 1}))


def test_mappings_may_say_0_since_they_name_every_concept():
    rows = {"text": ["a", "b"], "context": [{"slant": 0.0, "weight": 0.5}, {"slant": 0.0, "weight": 0.0}]}
    data = from_dataset(Dataset.from_dict(rows), content_column="text")
    assert data.contexts == ("", "weight=0.5")


@pytest.mark.parametrize("strength", ["heavy", "0.5.1", ""])
def test_text_that_is_no_number_is_no_strength(strength, tmp_path):
    with pytest.raises(
        ValueError, match=rf"Strength '{strength}' of concept 'weight'.*is not a number.*Rename the folder"
    ):
        load_folders(write_folders(tmp_path, {"obs": 1, f"weight={strength}": 1}))


def test_a_minus_after_the_sign_of_equality_is_no_separator(tmp_path):
    root = write_folders(tmp_path, {"obs": 1, "a": 1, "a=-1": 1, "a-b": 1, "b": 1})
    data = load_folders(root, joint_separator="-")
    assert (data.contexts, list(data.held_out)) == (("", "a", "a=-1.0", "b"), ["a+b"])


@pytest.mark.parametrize(
    ("separator", "folder", "context"),
    [
        ("-", "a=1e-1", "a=0.1"),
        ("-", "a=-2.5E-01-b", "a=-0.25+b"),
        ("-", "a=.5-b=-2-c", "a=0.5+b=-2.0+c"),
        (".", "a=0.5.b", "a=0.5+b"),
        ("e", "a=2eb", "a=2.0+b"),
    ],
)
def test_a_strength_is_whole_whatever_the_separator(separator, folder, context, tmp_path):
    root = write_folders(tmp_path, {"obs": 1, "a": 1, "b": 1, "c": 1, folder: 1})
    data = load_folders(root, joint_separator=separator)
    assert context in [*data.contexts, *data.held_out]


@pytest.mark.parametrize("other", ["weight", "weight_0.25"])
@pytest.mark.parametrize("name", ["weight_0.5", "weight 0.5", "weight0.5", "weight-0.5"])
def test_a_name_that_ends_in_a_strength_is_asked_about(name, other):
    with pytest.raises(ValueError, match=r"looks like the concept 'weight' at strength 0\..*'weight=0\."):
        text_data(["obs", name, other])
    assert name in text_data(["obs", name, other], concepts=[name, other]).concepts


def test_numbers_in_names_of_their_own_are_not_asked_about():
    assert text_data(["obs", "model v1.5", "weight"]).concepts.names == ("model v1.5", "weight")


def test_a_single_strength_that_is_not_1_is_warned_about():
    (warning,) = warnings_of(["obs", "weight=0.5", "weight=0.5", "slant"])
    assert "No rows of 'weight' at strength 1, only at 0.5" in warning
    assert "call these rows 'weight'" in warning
    (warning,) = warnings_of(["obs", "weight=0.5", "weight=0.25"])
    assert "only at 0.25, 0.5" in warning
    assert warnings_of(["obs", "weight=0.5", "weight", "weight=-1"]) == []


def test_strengths_on_another_scale_and_too_many_of_them_are_warned_about():
    (warning,) = warnings_of(["obs", "weight", "weight=700"])
    assert "at the strengths 1, 700" in warning
    warning = warnings_of(["obs", "weight", *(f"weight={i / 20}" for i in range(1, 20))])[-1]
    assert "'weight' has rows at 20 strengths" in warning


def test_sizes_count_all_strengths_of_a_concept():
    contexts = ["obs"] * 60 + [f"weight={i / 10}" for i in range(1, 11)] * 6
    assert warnings_of(contexts) == []
    assert not [each for each in check_data(text_data(contexts)).warnings if "Fewer than" in each]
    assert Context.parse(text_data(contexts).contexts[-1]).strengths == {"weight": 0.9}
