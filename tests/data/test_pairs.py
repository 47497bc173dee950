"""Pairs: files of one name in folders, a column of names in datasets; what is wrong with them is said at once."""

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_causal_context.cli import main
from hf_causal_context.data import check_data, from_dataset, load_folders
from hf_causal_context.data.arguments import AnyDataArguments, DataArguments
from hf_causal_context.data.from_arguments import load_any_data, load_data
from hf_causal_context.data.pairs import partners
from tests.data.small import write_folders, write_image


@pytest.fixture
def root(tmp_path):
    """Two images in each set, of the same names."""
    return write_folders(tmp_path / "data", {"obs": 2, "hat": 2, "wet": 2, "hat+wet": 1})


def test_equal_file_names_are_pairs_only_where_that_is_said(root):
    assert not load_folders(root).has_pairs
    data = load_folders(root, paired_files=True)
    assert dict.fromkeys(data.rows["pair"]) == {"000": None, "001": None}
    assert data.held_out["hat+wet"]["pair"] == ["000"]


def test_names_are_those_below_the_folder_of_the_context_whatever_the_suffix(tmp_path):
    for name in ("obs/day/1.png", "hat/day/1.bmp", "hat/1.png"):
        write_image(tmp_path / name)
    data = load_folders(tmp_path, paired_files=True)
    assert list(zip(data.rows["context"], data.rows["pair"], strict=True)) == [
        ("hat", "1"),
        ("hat", "day/1"),
        ("", "day/1"),
    ]


def test_the_partner_is_the_observational_row_of_the_name():
    contexts = ["hat", "", "wet", "hat", "", "wet", "hat"]
    names = ["b", "a", "a", "a", "b", "", "c"]
    assert partners(contexts, names).tolist() == [4, -1, 1, 1, -1, -1, -1]
    assert partners(["hat", ""], ["", ""]).tolist() == [-1, -1]  # rows without a name have none in common


@pytest.mark.parametrize("names", [["x", "x", None], [7, 7, None]])
def test_a_column_of_a_dataset(tmp_path, names):
    images = [Image.fromarray(np.full((2, 2), shade, dtype=np.uint8)) for shade in (0, 80, 160)]
    columns = {"image": images, "context": ["obs", "hat", "hat"], "sample": names, "pair": ["?"] * 3}
    Dataset.from_dict(columns).cast_column("image", ImageFeature()).save_to_disk(tmp_path / "saved")
    given = {"dataset_name": str(tmp_path / "saved"), "concepts": ["hat"]}
    data = load_data(DataArguments(**given, pair_column="sample"))
    assert data.rows["pair"] == [str(names[0])] * 2 + [""]
    assert [row.paired for row in check_data(data).rows] == [1, 1]
    assert not load_data(DataArguments(**given)).has_pairs  # a column that happens to have the name is none
    with pytest.raises(ValueError, match="The column 'image' holds Image.*, not names of samples."):
        from_dataset(data.rows, content_column="context", context_column="pair", pair_column="image")
    with pytest.raises(ValueError, match="no column 'nowhere' .pair_column=."):
        load_data(DataArguments(**given, pair_column="nowhere"))
    with pytest.raises(ValueError, match="content_column=, pair_column=, .* must be different columns"):
        load_data(DataArguments(**given, pair_column="context"))
    with pytest.raises(ValueError, match="which a stream does not find"):
        load_data(DataArguments(**given, pair_column="sample", streaming=True))
    with pytest.raises(ValueError, match="--paired_files is for folders. .* --pair_column"):
        load_data(DataArguments(**given, paired_files=True))


def test_columns_go_with_rules_too(tmp_path):
    images = [Image.fromarray(np.full((2, 2), shade, dtype=np.uint8)) for shade in (0, 80)]
    columns = {"image": images, "Hat": [0, 1], "person": ["ann", "ann"]}
    Dataset.from_dict(columns).cast_column("image", ImageFeature()).save_to_disk(tmp_path / "saved")
    rules = ["hat: Hat == 1"]
    arguments = DataArguments(dataset_name=str(tmp_path / "saved"), attribute_rules=rules, pair_column="person")
    with pytest.warns(UserWarning, match="selecting is not intervening"):
        assert load_data(arguments).rows["pair"] == ["ann", "ann"]


def test_folders_take_no_column_and_streams_no_pairs(root):
    with pytest.raises(ValueError, match="--pair_column='x' is for datasets. In folders, --paired_files says"):
        load_data(DataArguments(train_data_dir=str(root), pair_column="x"))
    with pytest.raises(ValueError, match="which a stream does not find. Leave it out, or do not stream."):
        load_data(DataArguments(train_data_dir=str(root), paired_files=True, streaming=True, concepts=["hat", "wet"]))


def test_the_check_says_how_many_rows_are_in_pairs(root, capsys):
    write_image(root / "hat" / "only.png")
    main(["check-data", "--train_data_dir", str(root), "--paired_files"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "context          role      rows  in pairs"
    assert [line.split() for line in lines[2:6]] == [
        ["(observational)", "train", "2", "2"],
        ["hat", "train", "3", "2"],
        ["wet", "train", "2", "2"],
        ["hat+wet", "held", "out", "1", "1"],
    ]
    (said,) = (line for line in lines if "have no partner" in line)
    assert "WARNING  1 images of interventions have no partner, an observational one of the same name: " in said
    assert "hat/only.png (hat)" in said
    main(["check-data", "--train_data_dir", str(root)])
    assert capsys.readouterr().out.splitlines()[0] == "context          role      rows"


def test_no_pairs_at_all_and_two_observational_images_of_one_name_are_errors(tmp_path):
    for name in ("obs/a.png", "hat/b.png"):
        write_image(tmp_path / name)
    (error,) = check_data(load_folders(tmp_path, paired_files=True)).errors
    assert error.startswith("No pairs: none of the images of interventions has the name of an observational one.")
    write_image(tmp_path / "hat" / "a.png")
    write_image(tmp_path / "obs" / "a.bmp")
    (error,) = check_data(load_folders(tmp_path, paired_files=True)).errors
    assert error.startswith("1 observational images have the name of another one: ")
    assert "obs/a.bmp (observational) = " in error
    assert "obs/a.png (observational)" in error


def test_one_image_may_have_been_edited_in_several_ways(tmp_path):
    images = [Image.fromarray(np.full((2, 2), shade, dtype=np.uint8)) for shade in (0, 80, 160)]
    columns = {"image": images, "context": ["obs", "hat", "hat"], "sample": ["a", "a", "a"]}
    Dataset.from_dict(columns).cast_column("image", ImageFeature()).save_to_disk(tmp_path / "saved")
    report = check_data(load_data(DataArguments(dataset_name=str(tmp_path / "saved"), pair_column="sample")))
    assert not report.errors
    assert [row.paired for row in report.rows] == [1, 2]


def test_partners_of_another_size_and_partners_that_are_the_same_image_are_named(root):
    Image.new("RGB", (6, 4)).save(root / "hat" / "000.png")
    (root / "wet" / "001.png").write_bytes((root / "obs" / "001.png").read_bytes())
    turned = Image.new("RGB", (4, 6), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "wet" / "turned.jpg", exif=exif)
    Image.new("RGB", (6, 4), "blue").save(root / "obs" / "turned.png")
    warnings = check_data(load_folders(root, paired_files=True)).warnings
    (sizes,) = (warning for warning in warnings if "two sizes" in warning)
    assert sizes.startswith("1 pairs have two sizes: ")
    assert "obs/000.png (observational), 4 x 4, and " in sizes
    assert "hat/000.png (hat), 6 x 4." in sizes
    (same,) = (warning for warning in warnings if "are in two contexts" in warning)
    assert "wet/001.png" in same


def test_texts_have_no_pairs(tmp_path):
    for context in ("obs", "loud"):
        (tmp_path / context).mkdir()
        (tmp_path / context / "a.txt").write_text(f"{context}\n")
    with pytest.raises(ValueError, match="The data holds texts, so --paired_files would have no effect. Leave it out."):
        load_any_data(AnyDataArguments(train_data_dir=str(tmp_path), paired_files=True))
