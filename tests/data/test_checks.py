import shutil
from dataclasses import replace

import pytest
from datasets import Dataset

from hf_causal_context.data import check_data, from_dataset, load_folders
from tests.data.small import write_folders

COUNTS = {"obs": 60, "a": 55, "b": 50, "a+b": 3}

streamed = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "data", COUNTS)


@streamed
def test_good_data(root, streaming):
    report = check_data(load_folders(root, streaming=streaming))
    assert report.errors == ()
    assert report.warnings == (
        ("Streaming: only the first 200 rows of each context were checked.",) if streaming else ()
    )
    report.raise_for_errors()
    assert [(row.context, row.role, row.count) for row in report.rows] == [
        ("", "train", 60),
        ("a", "train", 55),
        ("b", "train", 50),
        ("a+b", "held out", 3),
    ]
    assert report.table().splitlines()[:4] == [
        "context          role      rows",
        "-------------------------------",
        "(observational)  train       60",
        "a                train       55",
    ]


def test_a_stream_is_checked_in_part(root, monkeypatch):
    monkeypatch.setattr("hf_causal_context.data.checks.STREAM_ROWS", 4)
    for image in sorted((root / "b").iterdir())[4:]:
        image.write_bytes(b"broken")
    report = check_data(load_folders(root, streaming=True))
    assert [row.count for row in report.rows] == [4, 4, 4, 3]
    assert report.errors == ()
    assert report.warnings == ("Streaming: only the first 4 rows of each context were checked.",)


@streamed
def test_missing_sets(root, streaming):
    shutil.rmtree(root / "obs")
    report = check_data(load_folders(root, concepts=("a", "b", "c"), streaming=streaming))
    assert "There is no observational set" in report.errors[0]
    assert "what all your data differs from the base by, could not be told from the concepts." in report.errors[0]
    assert "the folder 'obs', or rows with the context 'obs' or ''" in report.errors[0]
    assert "No set for 'c' alone. Every concept needs one" in report.errors[1]
    with pytest.raises(ValueError, match="The data cannot be trained on:\n- There is no observational set.*\n- No set"):
        report.raise_for_errors()
    assert "ERROR    There is no observational set" in report.table()


def test_a_missing_set_in_a_table_stream():
    stream = Dataset.from_dict({"image": [0, 1], "context": ["obs", "a"]}).to_iterable_dataset()
    report = check_data(from_dataset(stream, concepts=("a", "b")))
    assert [(row.context, row.count) for row in report.rows] == [("", 1), ("a", 1), ("b", 0)]
    assert "No set for 'b' alone" in report.errors[0]


def test_tiny_and_lopsided_sets(tmp_path):
    write_folders(tmp_path, {"obs": 66, "a": 6})
    report = check_data(load_folders(tmp_path))
    assert report.errors == ()
    assert "Fewer than 50 rows in a (6)" in report.warnings[0]
    assert "Lopsided sets: (observational) has 66 rows, a only 6." in report.warnings[1]
    assert "repeat 11 times as often" in report.warnings[1]
    assert "WARNING  Lopsided" in report.table()


@streamed
def test_broken_images(root, streaming):
    for image in sorted((root / "a").iterdir())[:7]:
        image.write_bytes(image.read_bytes()[:60])
    data = load_folders(root, streaming=streaming)
    (root / "a+b" / "000.png").unlink()

    (error,) = check_data(data).errors
    assert error.startswith("8 images cannot be read: ")
    assert str(root / "a" / "000.png") in error
    assert str(root / "a" / "005.png") not in error
    assert "and 3 more. Replace or remove them." in error
    (unopened,) = check_data(data, decode=False).errors
    assert unopened.startswith(f"1 images cannot be read: {root / 'a+b' / '000.png'} (FileNotFoundError)")


@streamed
def test_the_same_image_in_two_contexts(root, streaming):
    for number in range(6):
        shutil.copy(root / "obs" / f"00{number}.png", root / "a" / f"00{number}.png")
    shutil.copy(root / "b" / "000.png", root / "b" / "again.png")
    report = check_data(load_folders(root, streaming=streaming))
    assert report.errors == ()
    warning = report.warnings[0]
    assert warning.startswith("6 images are in two contexts: ")
    assert f"{root / 'obs' / '000.png'} (observational)" in warning
    assert "and 1 more. What was intervened on is then ambiguous" in warning


@streamed
def test_held_out_images_that_leak(root, streaming):
    shutil.copy(root / "a" / "001.png", root / "a+b" / "001.png")
    (error,) = check_data(load_folders(root, streaming=streaming)).errors
    assert error.startswith("1 held-out images are also trained on: ")
    assert f"{root / 'a' / '001.png'} (a) = {root / 'a+b' / '001.png'} (a+b)" in error
    assert "Remove them from one of the two" in error


def test_held_out_contexts_among_the_training_rows(root):
    data = load_folders(root, training_contexts=["obs", "a", "b", "a+b"])
    held_out = load_folders(root).held_out
    report = check_data(replace(data, held_out=held_out))
    assert "Held-out contexts are among the training rows: 'a+b'" in report.errors[0]


def test_payloads_that_are_not_images():
    rows = {"image": [[1.0, 2.0], [1.0, 2.0], None], "context": ["obs", "a", "a"]}
    report = check_data(from_dataset(Dataset.from_dict(rows)))
    assert "1 images cannot be read: row 2 of 'a' (train) (no value)" in report.errors[0]
    assert (
        "row 0 of the observational context (train) (observational) = row 1 of 'a' (train) (a)" in report.warnings[-1]
    )


def test_warnings_of_the_data_are_kept(root):
    assert "from elsewhere" in check_data(replace(load_folders(root), warnings=("from elsewhere",))).warnings
