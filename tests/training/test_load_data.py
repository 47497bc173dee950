"""The texts that arguments name, and how they are told from images."""

from dataclasses import replace

import pytest
from datasets import Image

from hf_causal_context.data import load_text_folders
from hf_causal_context.data.arguments import AnyDataArguments, TextDataArguments
from hf_causal_context.data.from_arguments import load_any_data, load_text_data
from tests.data.small import write_image
from tests.data.small_texts import rows_of, table, texts, write, write_text_folders


def test_text_arguments_name_folders_or_a_dataset(tmp_path):
    folders = load_text_folders(write_text_folders(tmp_path / "texts", "prompt"))
    named = load_text_data(TextDataArguments(train_data_dir=str(tmp_path / "texts")))
    assert rows_of(named) == rows_of(folders)
    chosen = {"held_out_contexts": ["happy", "happy+long"], "concepts": ["long", "happy"], "streaming": True}
    held_out = load_text_data(TextDataArguments(train_data_dir=str(tmp_path / "texts"), **chosen))
    assert (held_out.contexts, held_out.concepts.names) == (("", "long"), ("long", "happy"))
    assert held_out.streaming

    table("text", text="body", context="do").save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    dataset = load_text_data(TextDataArguments(dataset_name=saved, text_column="body", context_column="do", **chosen))
    assert dataset.content_column == "text"
    assert [row["text"] for row in dataset.held_out["happy"]] == texts("happy", 3)
    rules = ["happy: do == 'happy' or do == 'happy+long'", "long: do == 'long'"]
    with pytest.warns(UserWarning, match="selecting is not intervening"):
        selected = load_text_data(TextDataArguments(dataset_name=saved, text_column="body", attribute_rules=rules))
    assert selected.counts == {"": 4, "happy": 5, "long": 2}


@pytest.mark.filterwarnings("ignore:Contexts are made by selecting")
def test_contexts_of_rules_have_the_name_that_is_given_beside_a_column_of_contexts(tmp_path):
    table("text").save_to_disk(tmp_path / "saved")
    arguments = TextDataArguments(dataset_name=str(tmp_path / "saved"), attribute_rules=["glad: context == 'happy'"])
    with pytest.raises(ValueError, match="has a column 'context' already"):
        load_text_data(arguments)
    renamed = load_text_data(replace(arguments, context_column="mood"))
    assert [row["text"] for row in renamed.rows if row["context"] == "glad"] == texts("happy", 3)


def test_one_source_and_rules_that_fit():
    for both in ({}, {"train_data_dir": "a", "dataset_name": "b"}):
        with pytest.raises(ValueError, match="Give the data as either --train_data_dir"):
            load_text_data(TextDataArguments(**both))
    with pytest.raises(ValueError, match="--attribute_rules make contexts .* without --train_data_dir and --concepts"):
        load_text_data(TextDataArguments(train_data_dir="a", attribute_rules=["a: b == 1"]))
    with pytest.raises(ValueError, match="--attribute_rules 'b == 1' must be a concept, a colon and a rule"):
        load_text_data(TextDataArguments(dataset_name="a", attribute_rules=["b == 1"]))


@pytest.mark.parametrize("shape", ["messages", "prompt"])
def test_images_and_texts_are_told_apart(tmp_path, shape):
    write_text_folders(tmp_path / "texts", "text")
    assert load_any_data(AnyDataArguments(train_data_dir=str(tmp_path / "texts"))).content_column == "text"
    write_image(tmp_path / "texts" / "obs" / "cover.png")
    (tmp_path / "texts" / ".cache").mkdir()
    assert load_any_data(AnyDataArguments(train_data_dir=str(tmp_path / "texts"))).content_column == "text"
    for context in ("obs", "a"):
        write_image(tmp_path / "images" / context / "0.png")
        write(tmp_path / "images" / context / "notes.txt", "Made by hand.")
    assert load_any_data(AnyDataArguments(train_data_dir=str(tmp_path / "images"))).content_column == "image"

    table(shape).save_to_disk(tmp_path / "rows")
    assert load_any_data(AnyDataArguments(dataset_name=str(tmp_path / "rows"))).content_column == shape
    table("text").save_to_disk(tmp_path / "unnamed")
    assert load_any_data(AnyDataArguments(dataset_name=str(tmp_path / "unnamed"))).content_column == "text"
    images = [str(tmp_path / "images" / "obs" / "0.png")] * 11

    def with_images(rows):
        return rows.add_column("image", images).cast_column("image", Image())

    with_images(table("text")).save_to_disk(tmp_path / "captioned")
    captioned = str(tmp_path / "captioned")
    assert load_any_data(AnyDataArguments(dataset_name=captioned)).content_column == "image"
    assert load_any_data(AnyDataArguments(dataset_name=captioned, text_column="text")).content_column == "text"
    with_images(table(shape)).save_to_disk(tmp_path / "seen")
    assert load_any_data(AnyDataArguments(dataset_name=str(tmp_path / "seen"))).content_column == "image"


def test_folders_of_neither_images_nor_texts_are_told_what_is_read(tmp_path):
    for name in ("obs", "formal"):
        (tmp_path / "tables" / name).mkdir(parents=True)
        (tmp_path / "tables" / name / "rows.csv").write_text("text\nhi\n")
    read = r"\. Allowed are, .* such as \.mp4, and texts: \.txt, .* or \.jsonl"
    for folder, files in (("", r"2 \.csv \(formal/rows.csv, \.\.\.\)"), ("obs", r"1 \.csv \(rows.csv\)")):
        with pytest.raises(ValueError, match=f"has neither images nor texts. Files that are not read: {files}{read}"):
            load_any_data(AnyDataArguments(train_data_dir=str(tmp_path / "tables" / folder)))
    (tmp_path / "tables" / "obs" / "rows.csv").rename(tmp_path / "tables" / "obs" / "rows.txt")
    with pytest.raises(ValueError, match="one folder of texts per context.* give the folder above it: '.*tables'"):
        load_any_data(AnyDataArguments(train_data_dir=str(tmp_path / "tables" / "obs")))
