import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_causal_context.data import check_data, from_dataset, load_folders, load_text_folders
from hf_causal_context.quickstart import digit_data
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


def test_missing_sets_that_are_held_out(root):
    obs, single = check_data(load_folders(root, training_contexts=["b"])).errors
    assert obs.endswith("There are rows of 'obs', which are held out: see training_contexts= and held_out_contexts=.")
    assert "There are rows of 'a', which are held out" in single


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
    assert "1 images cannot be read: row 1 of 'a' (train) (no value)" in report.errors[0]
    assert "row 0 of the observational context (train) = row 0 of 'a' (train)." in report.warnings[-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_caption_that_is_missing(root, streaming):
    files = [str(path) for name in ("obs", "a") for path in sorted((root / name).glob("*.png"))[:2]]
    columns = {"image": files, "context": ["obs", "obs", "a", "a"], "text": ["x", "", None, "y"]}
    rows = Dataset.from_dict(columns).cast_column("image", ImageFeature())
    rows = rows.to_iterable_dataset() if streaming else rows
    report = check_data(from_dataset(rows, concepts=("a",), caption_column="text"))
    (error,) = report.errors
    assert error.startswith("1 images cannot be read: ")
    assert f"{files[2]} (its caption is missing; write '' for an empty one)" in error


def test_rows_that_are_there_more_than_once(tmp_path):
    for context, lines in (("obs", ["x", "y", "x", "x"]), ("a", ["z", "w"])):
        (tmp_path / context).mkdir()
        (tmp_path / context / "texts.txt").write_text("\n".join(lines))
    assert (
        "Some texts are there more than once, and weigh that much more: 2 of 4 of (observational). Remove them, unless "
        "that is meant."
    ) in check_data(load_text_folders(tmp_path)).warnings


def test_warnings_of_the_data_are_kept(root):
    assert "from elsewhere" in check_data(replace(load_folders(root), warnings=("from elsewhere",))).warnings


def photo(seed):
    """An image of smooth spots, as photos are."""
    values = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((256, 256), Image.Resampling.BICUBIC)


@streamed
def test_images_that_look_alike_in_two_contexts(root, streaming):
    for number in range(30):
        photo(number).save(root / "obs" / f"photo{number}.png")
    photo(3).save(root / "a" / "copy.jpg", quality=80)
    photo(4).resize((200, 200), Image.Resampling.LANCZOS).save(root / "b" / "smaller.png")
    shutil.copy(root / "obs" / "photo5.png", root / "b" / "same.png")  # which is told as what it is
    photo(6).save(root / "obs" / "again.jpg", quality=80)  # in one context
    edited = photo(7)
    edited.paste("black", (64, 64, 128, 128))
    edited.save(root / "a" / "edited.png")
    report = check_data(load_folders(root, streaming=streaming))
    assert report.errors == ()
    (warning,) = (text for text in report.warnings if "look like" in text)
    names = f"{root / 'a' / 'copy.jpg'} (a) = {root / 'obs' / 'photo3.png'} (observational), "
    names += f"{root / 'b' / 'smaller.png'} (b) = {root / 'obs' / 'photo4.png'} (observational)"
    assert warning == (
        f"2 images look like one of another context: {names}. Look at them: small edits are right; edits that did "
        "nothing, and copies, spoil what is learned."
    )


@pytest.mark.slow
def test_sets_of_another_size_than_the_observational_one(tmp_path):
    root, generator = tmp_path / "data", np.random.default_rng(0)
    sizes = {"obs": (30, 20), "a": (30, 20), "b": (20, 20), "c": (12, 8), "c=0.5": (8, 8), "few": (8, 8), "a+b": (8, 8)}
    for context, (width, height) in sizes.items():
        (root / context).mkdir(parents=True)
        for number in range(9 if context == "few" else 50):
            image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
            turned = context == "a" and number % 2  # as a phone saves it
            exif = Image.Exif()
            exif[0x0112] = 6 if turned else 1
            image.rotate(90 * turned, expand=True).save(root / context / f"{number}.png", exif=exif)
    warnings = [warning for warning in check_data(load_folders(root)).warnings if "another size" in warning]
    assert [warning.partition(" Scaled")[0] for warning in warnings] == [
        "Images of another size than the observational ones (30 x 20): b (20 x 20), c (12 x 8), c=0.5 (8 x 8)."
    ]


def test_digits_of_a_kind_do_not_look_alike():
    data = digit_data(40, 0)
    assert not [text for text in check_data(data).warnings if "look like" in text]


def test_sub_folders_that_are_read_as_part_of_a_context(root, tmp_path):
    write_folders(root / "a", {"day": 1, "night": 2})
    (warning,) = load_folders(root).warnings
    assert warning == (
        "Sub-folders are read as part of their context (a: day, night). Where they are contexts, put them beside it."
    )
    for file in ("obs/b.txt", "a/deep/down/b.txt"):
        (tmp_path / "texts" / file).parent.mkdir(parents=True)
        (tmp_path / "texts" / file).write_text("one\n")
    assert "(a: deep/down)" in load_text_folders(tmp_path / "texts").warnings[0]


def test_a_concept_that_is_misspelled_is_told_beside_what_the_data_says(root):
    message = r"Unknown concept 'a' in .*Known concepts: 'aa', 'b'"
    with pytest.raises(ValueError, match=message):
        load_folders(root, concepts=("aa", "b"))
    shutil.move(root / "a", root / "glasses")
    shutil.rmtree(root / "a+b")
    with pytest.raises(ValueError, match=r"'glasses', and concepts= does not: one of the two is misspelled\.$"):
        load_folders(root, concepts=("glases", "b"))


def test_a_name_that_looks_like_an_address_is_that_of_a_file(root):
    (root / "a" / "000.png").rename(root / "a" / "12::30.png")
    assert check_data(load_folders(root)).errors == ()


@pytest.mark.parametrize("suffix", [b".png", b".txt"])
def test_a_name_that_is_no_text_is_refused(root, suffix):
    (root / "b" / os.fsdecode(b"caf\xe9" + suffix)).write_bytes(b"x")
    load = load_folders if suffix == b".png" else load_text_folders
    with pytest.raises(ValueError, match=r"The name of the file '.*b/caf\\udce9.*' is not UTF-8. Rename it."):
        load(root)
