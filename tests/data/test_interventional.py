import json
import re
import shutil

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, List, Value

from hf_causal_context.contexts import Context
from hf_causal_context.data import from_dataset, load_folders, open_dataset
from hf_causal_context.errors import UserValueError
from tests.data.small import write_folders, write_image

COUNTS = {"obs": 4, "thick": 3, "slant": 2, "thick+slant": 2}


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "digits", COUNTS)


def write_metadata(folder, lines):
    (folder / "metadata.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )


def table(contexts, feature=None, **columns):
    dataset = Dataset.from_dict({"image": list(range(len(contexts))), "context": contexts, **columns})
    return dataset if feature is None else dataset.cast_column("context", feature)


# Folders


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_are_contexts_and_combinations_are_held_out(root, streaming):
    data = load_folders(root, streaming=streaming)

    assert data.concepts.names == ("slant", "thick")
    assert data.contexts == ("", "slant", "thick")
    assert data.counts == {"": 4, "slant": 2, "thick": 3}
    assert data.streaming is streaming
    assert not data.has_captions
    assert sorted(row["context"] for row in data.rows) == [""] * 4 + ["slant"] * 2 + ["thick"] * 3
    assert all(isinstance(row["image"], PIL.Image.Image) for row in data.rows)
    assert {context: len(list(rows)) for context, rows in data.held_out.items()} == {"slant+thick": 2}


def test_concepts_keep_the_given_order(root):
    assert load_folders(root, concepts=("thick", "slant")).concepts.names == ("thick", "slant")


def test_strengths_nested_files_and_other_files(tmp_path):
    write_folders(tmp_path, {"obs": 1, "thick=0.5": 1, ".hidden": 1})
    write_image(tmp_path / "obs" / "more" / "test_1.png")
    write_image(tmp_path / "obs" / ".thumbnails" / "0.png")
    (tmp_path / "obs" / "notes.txt").write_text("not an image")
    (tmp_path / "readme.txt").write_text("not a folder")

    assert load_folders(tmp_path).counts == {"": 2, "thick=0.5": 1}


def test_named_contexts_are_held_out_or_trained(root):
    held_out = load_folders(root, held_out_contexts=["slant"])
    assert held_out.contexts == ("", "thick")
    assert set(held_out.held_out) == {"slant", "slant+thick"}

    oracle = load_folders(root, training_contexts=["obs", "thick", "slant", ("thick", "slant")])
    assert oracle.contexts == ("", "slant", "slant+thick", "thick")
    assert oracle.held_out == {}


def test_captions(root):
    for folder, count in COUNTS.items():
        write_metadata(
            root / folder, [{"file_name": f"{n:03}.png", "text": f"{folder} {n}"} for n in reversed(range(count))]
        )
    data = load_folders(root)

    assert data.has_captions
    assert data.rows.filter(lambda row: row["context"] == "thick")["caption"][:] == ["thick 0", "thick 1", "thick 2"]


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (["{"], ValueError, r"Line 1 of .*metadata.jsonl' is not JSON .* Write one object per line"),
        ([{"file_name": "000.png"}], ValueError, r'must be {"file_name": "...", "text": "..."}; received'),
        (["3"], ValueError, r'must be {"file_name": "...", "text": "..."}; received .3.'),
        ([{"file_name": "../thick/000.png", "text": ""}], ValueError, "'../thick/000.png' leaves the folder"),
        ([{"file_name": "a/../../x.png", "text": ""}], ValueError, "leaves the folder. Only images inside it"),
        ([{"file_name": "/etc/x.png", "text": ""}], ValueError, "'/etc/x.png' leaves the folder"),
        ([{"file_name": "x.png", "text": ""}], FileNotFoundError, "there is no image 'x.png'.* Correct file_name"),
        ([{"file_name": "000.png", "text": ""}] * 2, ValueError, "Line 2 .*'000.png' has a second caption"),
        ([{"file_name": "000.png", "text": ""}, ""], ValueError, "has no caption for '001.png'. Add one for each"),
    ],
)
def test_bad_metadata(tmp_path, lines, error, message):
    write_folders(tmp_path, {"obs": 2})
    write_metadata(tmp_path / "obs", lines)
    with pytest.raises(error, match=message):
        load_folders(tmp_path)


def test_captions_in_some_folders_only(tmp_path):
    write_folders(tmp_path, {"obs": 1, "thick": 1})
    write_metadata(tmp_path / "obs", [{"file_name": "000.png", "text": "a digit"}])
    with pytest.raises(
        ValueError, match="'thick' has no captions, while other folders have. Caption every folder, or none"
    ):
        load_folders(tmp_path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder. Give the folder that holds one folder of images per"):
        load_folders(tmp_path / "missing")
    with pytest.raises(ValueError, match="has no folders. It must hold one folder of images per .*'thick.slant'.$"):
        load_folders(tmp_path)
    write_folders(tmp_path / "given", {"obs": 1})
    above = re.escape(f"If its files are one context, give the folder above it: {str(tmp_path / 'given')!r}.")
    with pytest.raises(ValueError, match=f"{above}$"):
        load_folders(tmp_path / "given" / "obs")
    shutil.rmtree(tmp_path / "given")
    (tmp_path / "obs").mkdir()
    with pytest.raises(ValueError, match="obs' has no images. .* Add images, or remove the folder"):
        load_folders(tmp_path)


def test_bad_folder_names(tmp_path):
    write_folders(tmp_path / "twice", {"obs": 1, "a": 1, "b": 1, "a+b": 1, "b+a": 1})
    with pytest.raises(ValueError, match=r"folders 'a\+b' and 'b\+a' in .* are the same context"):
        load_folders(tmp_path / "twice")
    write_folders(tmp_path / "strength", {"a=x": 1})
    with pytest.raises(ValueError, match="Folder .*a=x': Strength 'x' of concept 'a' .* Rename the folder"):
        load_folders(tmp_path / "strength")
    write_folders(tmp_path / "pairs", {"obs": 1, "a+b": 1})
    with pytest.raises(ValueError, match=r"No context has exactly one target.*'', 'a\+b'. Add a set for every single"):
        load_folders(tmp_path / "pairs")


def test_unknown_concepts(root):
    with pytest.raises(ValueError, match="Unknown concept 'thick' in context .*Known concepts: 'thik', 'slant'"):
        load_folders(root, concepts=("thik", "slant"))
    with pytest.raises(ValueError, match="Duplicate concepts: 'thick'"):
        load_folders(root, concepts=("thick", "thick"))
    with pytest.raises(TypeError, match="must be a sequence of names"):
        load_folders(root, concepts="thick")
    with pytest.raises(ValueError, match="concept 'thick' has the name of the observational context"):
        load_folders(root, concepts=("thick", "slant"), observational_name="thick")


def test_named_contexts_must_exist_and_not_overlap(root):
    with pytest.raises(ValueError, match="held_out_contexts= names 'bold', which has no rows. Contexts found: '', "):
        load_folders(root, held_out_contexts=["bold"])
    with pytest.raises(ValueError, match="training_contexts= names 'bold', which has no rows"):
        load_folders(root, training_contexts=["obs", "bold"])
    with pytest.raises(ValueError, match="'thick' cannot be both trained on and held out"):
        load_folders(root, held_out_contexts=["thick"], training_contexts=["thick"])
    with pytest.raises(ValueError, match="No rows to train on. Contexts found, all held out"):
        load_folders(root, held_out_contexts=["obs", "slant", "thick"])
    with pytest.raises(TypeError, match="'thick' must be a list of contexts"):
        load_folders(root, held_out_contexts="thick")


# Datasets


@pytest.mark.parametrize(
    ("contexts", "feature"),
    [
        (["obs", "", "b", "a", "b + a"], None),
        ([[], ["obs"], ["b"], ["a"], ["a", "b"]], List(Value("string"))),
        ([{}, {"a": 0.0}, {"b": 1.0}, {"a": 1.0}, {"a": 1.0, "b": 1.0}], None),
        ([0, 0, 2, 1, 3], ClassLabel(names=["obs", "a", "b", "a+b"])),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_context_column(contexts, feature, streaming):
    dataset = table(contexts, feature)
    if streaming:
        dataset = dataset.to_iterable_dataset()
        data = from_dataset(dataset, concepts=("a", "b"), held_out_contexts=["a+b"])
    else:
        data = from_dataset(dataset)

    assert [(row["image"], row["context"]) for row in data.rows] == [(0, ""), (1, ""), (2, "b"), (3, "a")]
    assert [row["image"] for row in data.held_out["a+b"]] == [4]
    assert data.counts == (None if streaming else {"": 2, "a": 1, "b": 1})


def test_strengths_and_further_columns():
    data = from_dataset(table([{"a": 0.5, "b": None}, {"a": None, "b": None}], extra=[7, 8]))
    assert data.rows[:] == {"image": [0, 1], "extra": [7, 8], "context": ["a=0.5", ""]}
    assert data.held_out == {}


@pytest.mark.parametrize("streaming", [False, True])
def test_other_column_names(root, streaming):
    images = [str(path) for path in sorted(root.rglob("*.png"))]
    dataset = Dataset.from_dict(
        {"pic": images, "do": ["obs", "a"] * 5 + ["b"], "text": ["t"] * 11, "caption": ["old"] * 11}
    ).cast_column("pic", Image())
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    names = {"context_column": "do", "content_column": "pic"}
    data = from_dataset(dataset, concepts=("a", "b"), caption_column="text", **names)

    assert set(data.rows.column_names) == {"pic", "context", "caption"}
    row = next(iter(data.rows))
    assert isinstance(row["pic"], PIL.Image.Image)
    assert (row["context"], row["caption"], data.content_column) == ("", "t", "pic")
    assert not from_dataset(dataset, concepts=("a", "b"), **names).has_captions


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["caption", "mask", "pair"])
def test_contexts_may_be_in_a_column_of_any_name(name, streaming):
    rows = Dataset.from_dict({"image": [1, 2, 3], name: ["obs", "a", "b"], "text": ["x", "y", "z"]})
    rows = rows.to_iterable_dataset() if streaming else rows
    data = from_dataset(rows, concepts=("a", "b"), context_column=name, caption_column="text")
    assert [(row["context"], row["caption"]) for row in data.rows] == [("", "x"), ("a", "y"), ("b", "z")]
    assert set(data.rows.column_names) == {"image", "context", "caption"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"content_column": "mask"}, "'mask' was named as content_column=, and a column 'mask' is for masks. Rename"),
        ({"caption_column": "pair"}, "'pair' was named as caption_column=, and a column 'pair' is for names of samp"),
        ({"pair_column": "caption"}, "'caption' was named as pair_column=, and a column 'caption' is for captions"),
    ],
)
def test_a_column_with_the_name_of_another_is_refused(given, message):
    columns = {name: [1, 2] for name in ("image", "mask")}
    columns |= {name: ["obs", "a"] for name in ("context", "caption", "pair")}
    with pytest.raises(UserValueError, match=message):
        from_dataset(Dataset.from_dict(columns), **given)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_and_masks_that_a_dataset_does_not_decode_are_decoded(root, streaming):
    images = [str(path) for path in sorted(root.rglob("*.png"))][:2]
    rows = Dataset.from_dict({"image": images, "where": images, "context": ["obs", "a"]})
    rows = rows.cast_column("image", Image(decode=False, mode="L")).cast_column("where", Image(decode=False))
    rows = rows.to_iterable_dataset() if streaming else rows
    row = next(iter(from_dataset(rows, concepts=("a",), mask_column="where").rows))
    assert row["image"].mode == "L"
    assert isinstance(row["mask"], PIL.Image.Image)


def test_stream_without_declared_features():
    stream = IterableDataset.from_generator(lambda: iter([{"image": 1, "context": "a"}]))
    assert list(from_dataset(stream, concepts=("a",)).rows) == [{"image": 1, "context": "a"}]


def test_stream_says_which_contexts_it_yields():
    stream = table(["obs", "a", "b=0.5", "a+b"]).to_iterable_dataset()
    data = from_dataset(stream, concepts=("a", "b"))
    assert [row["context"] for row in data.rows] == ["", "a"]
    assert "only rows of the contexts '', 'a', 'b' are trained on; other rows are skipped" in data.warnings[0]
    strengths = from_dataset(stream, concepts=("a", "b"), training_contexts=["", "a", Context({"b": 0.5})])
    assert [row["context"] for row in strengths.rows] == ["", "a", "b=0.5"]


def test_dataset_errors():
    rows = table(["obs", "a"], text=[["x"], ["y"]])
    with pytest.raises(ValueError, match="no column 'ctx' .context_column=.. Its columns: 'image', 'context', 'text'"):
        from_dataset(rows, context_column="ctx")
    with pytest.raises(ValueError, match="no column 'pixels' .content_column=.. .* Name one of them, or add"):
        from_dataset(rows, content_column="pixels")
    with pytest.raises(ValueError, match="no column 'words' .caption_column=."):
        from_dataset(rows, caption_column="words")
    with pytest.raises(ValueError, match="caption_column= and mask_column= must be different columns"):
        from_dataset(rows, content_column="context")
    with pytest.raises(ValueError, match="caption column 'text' holds List.* must hold one text per row"):
        from_dataset(rows, caption_column="text")
    with pytest.raises(TypeError, match="DatasetDict is not a dataset. .* Choose one of its splits: 'train'"):
        from_dataset(DatasetDict(train=rows))
    with pytest.raises(ValueError, match="A streaming dataset needs concepts=. .* Name them in order"):
        from_dataset(rows.to_iterable_dataset())


def test_a_combination_with_a_name_that_has_no_set_alone():
    message = "'glasses.hats' names 'hats', and there is no set of 'hats' alone, .* Did you mean 'hat'. Correct"
    with pytest.raises(ValueError, match=message):
        from_dataset(table(["obs", "glasses", "hat", "hats+glasses"]))


@pytest.mark.parametrize(
    ("contexts", "error", "message"),
    [
        (["obs", "c"], ValueError, "Row 1: Unknown concept 'c' in context 'c'. Known concepts: 'a', 'b'"),
        (["obs", None], ValueError, "Row 1: The context is missing .None.. Observational rows say 'obs' or ''"),
        (["a=x"], ValueError, "Row 0: Strength 'x' of concept 'a'"),
        ([["a", "b=1"]], ValueError, "Row 0: Concept name 'b=1' must not contain"),
        ([3], TypeError, "Row 0: 3 of type int is not a context"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows(contexts, error, message, streaming):
    dataset = table(contexts)
    with pytest.raises(error, match=message):
        list(from_dataset(dataset.to_iterable_dataset() if streaming else dataset, concepts=("a", "b")).rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_label_that_nobody_gave_is_no_context(streaming):
    """It is -1, which Python takes for the last of the names."""
    dataset = table([0, 1, -1], ClassLabel(names=["obs", "a"]))
    with pytest.raises(ValueError, match="Row 2: The context is missing"):
        list(from_dataset(dataset.to_iterable_dataset() if streaming else dataset, concepts=("a",)).rows)


def test_empty_stream():
    with pytest.raises(ValueError, match="The streaming dataset has no rows. Check its files"):
        from_dataset(IterableDataset.from_generator(lambda: iter(())), concepts=("a",))


def test_what_cannot_be_opened_is_the_users_error(tmp_path):
    DatasetDict(test=table(["a"])).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "rows.jsonl").write_text("{bad")
    for folder, message in (("splits", "it has no split 'train', only 'test'"), ("files", "JSON parse error")):
        with pytest.raises(UserValueError, match=f"The dataset '.*{folder}' cannot be read: .*{message}"):
            open_dataset(str(tmp_path / folder))
    with pytest.raises(UserValueError, match="dataset_config_name='b' .* save_to_disk wrote this one, which has"):
        open_dataset(str(tmp_path / "splits"), config_name="b")
    with pytest.raises(UserValueError, match="BuilderConfig 'b' not found"):
        open_dataset(str(tmp_path / "files"), config_name="b")
    with pytest.raises(UserValueError, match="The first rows of the streaming dataset cannot be read: JSON parse"):
        from_dataset(open_dataset(str(tmp_path / "files"), streaming=True), concepts=("a",))


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_of_every_kind_of_folder(tmp_path, streaming):
    rows = table(["obs", "a"])
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows, test=table(["a"])).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    rows.to_json(tmp_path / "files" / "rows.jsonl")

    for folder in ("saved", "splits", "files"):
        data = from_dataset(open_dataset(str(tmp_path / folder), streaming=streaming), concepts=("a",))
        assert data.streaming is streaming
        assert [row["context"] for row in data.rows] == ["", "a"]
    test = from_dataset(open_dataset(str(tmp_path / "splits"), split="test"), concepts=("a",))
    assert [row["context"] for row in test.rows] == ["a"]
    assert Features(test.rows.features)["context"] == Value("string")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "columns"), [("torch", None), ("numpy", None), ("torch", ["label"]), (None, ["label"])]
)
def test_a_format_that_a_dataset_was_saved_with_changes_nothing(root, tmp_path, kind, columns, streaming):
    images = [str(path) for path in sorted(root.rglob("*.png"))][:2]
    rows = Dataset.from_dict({"image": images, "label": [3, 4], "context": ["obs", "a"]}).cast_column("image", Image())
    rows.with_format(kind, columns=columns).save_to_disk(tmp_path / "saved")
    data = from_dataset(open_dataset(str(tmp_path / "saved"), streaming=streaming), concepts=("a",))
    row = next(iter(data.rows))
    assert isinstance(row["image"], PIL.Image.Image)
    assert (type(row["label"]), row["label"], row["context"]) == (int, 3, "")


def test_a_transform_of_the_users_own_is_kept():
    rows = table(["obs", "a"]).with_transform(lambda batch: batch | {"image": [7]})
    assert from_dataset(rows).rows[0] == {"image": 7, "context": ""}


def test_no_concept_of_new_data_is_called_like_the_empty_context(tmp_path):
    write_folders(tmp_path, {"plain": 1, "obs": 1, "thick": 1})
    for concepts in (None, ["obs", "thick"]):
        with pytest.raises(
            ValueError, match="A concept 'obs' would be hidden by the empty context.*leave observational"
        ):
            load_folders(tmp_path, observational_name="plain", concepts=concepts)
