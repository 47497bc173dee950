"""Captions in the forms of diffusers, `datasets` and kohya, and files that nobody reads."""

import csv
import json
import os
from pathlib import Path

import pytest
from datasets import Image

from hf_causal_context.data import check_data, load_folders, load_text_folders
from hf_causal_context.data.arguments import DataArguments
from hf_causal_context.data.from_arguments import load_data
from tests.data.small import write_folders, write_image
from tests.data.small_texts import write_text_folders

COUNTS = {"obs": 2, "hat": 2, "hat+rain": 1, "rain": 1}
CAPTIONS = {
    f"{folder}/{number:03}.png": f'a "{folder}", ü\u2028{number}'  # for CSV, and a line as Unicode sees it
    for folder, count in COUNTS.items()
    for number in range(count)
}


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "data", COUNTS)


def captions_of(data, root):
    parts = [part.cast_column("image", Image(decode=False)) for part in (data.rows, *data.held_out.values())]
    return {str(Path(row["image"]["path"]).relative_to(root)): row["caption"] for part in parts for row in part}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


FORMS = {"metadata.jsonl": write_jsonl, "metadata.csv": write_csv}


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize("name", FORMS)
def test_metadata_may_stand_at_the_root_or_in_each_folder(root, name, column):
    rows = [{"file_name": image, column: text} for image, text in CAPTIONS.items()]
    FORMS[name](root / name, rows)
    data = load_folders(root)
    assert captions_of(data, root) == CAPTIONS
    assert data.warnings == ()

    (root / name).unlink()
    for folder in COUNTS:
        own = [
            row | {"file_name": Path(row["file_name"]).name}
            for row in rows
            if row["file_name"].startswith(f"{folder}/")
        ]
        FORMS[name](root / folder / name, own)
    assert captions_of(load_folders(root), root) == CAPTIONS


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT"])
def test_a_text_file_beside_an_image_is_its_caption(root, suffix):
    for image, text in CAPTIONS.items():
        (root / image).with_suffix(suffix).write_text(f"\ufeff{text}\n", encoding="utf-8")
    data = load_folders(root)
    assert captions_of(data, root) == CAPTIONS
    assert data.warnings == ()


def test_names_of_files_may_spell_accents_in_two_ways(tmp_path):
    """As on macOS, in what it packs, and in a table that somebody typed."""
    apart, together = "cafe\u0301", "caf\u00e9"
    for folder in ("obs", apart):
        write_image(tmp_path / folder / f"{apart if folder == 'obs' else together}.png")
        write_image(tmp_path / folder / "plain.png")
    write_image(tmp_path / "obs" / f"{together}.mask.png")
    (tmp_path / "obs" / "metadata.csv").write_text(f"file_name,text\n{together}.png,one\nplain.png,two\n", "utf-8")
    for name in (apart, "plain"):
        (tmp_path / apart / f"{name}.txt").write_text("three")
    data = load_folders(tmp_path, paired_files=True, training_contexts=["obs", together])
    assert sorted(zip(data.rows["pair"], data.rows["caption"], strict=True)) == [
        *((together, "one"), (together, "three"), ("plain", "three"), ("plain", "two"))
    ]
    assert data.concepts.names == (together,)
    assert [row["mask"] is not None for row in data.rows].count(True) == 1


def test_forms_may_be_mixed_but_an_image_has_one_caption(root):
    rows = [{"file_name": image, "text": text} for image, text in CAPTIONS.items()]
    write_jsonl(root / "metadata.jsonl", rows[1:])
    beside = (root / rows[0]["file_name"]).with_suffix(".txt")
    beside.write_text(rows[0]["text"], encoding="utf-8")
    assert captions_of(load_folders(root), root) == CAPTIONS
    write_jsonl(root / "metadata.jsonl", rows)
    with pytest.raises(ValueError, match=r"000.txt': '000.png' has a second caption. Keep one per image"):
        load_folders(root)


def test_the_caption_column_names_what_metadata_of_folders_hold(root):
    rows = [{"file_name": image, "text": "no", "long": text} for image, text in CAPTIONS.items()]
    write_csv(root / "metadata.csv", rows)
    arguments = DataArguments(train_data_dir=str(root), caption_column="long")
    assert captions_of(load_data(arguments), root) == CAPTIONS
    with pytest.raises(ValueError, match='Line 2 of .*metadata.csv. must be {"file_name": "...", "short": "..."}'):
        load_folders(root, caption_column="short")
    (root / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="caption_column='long' was given, but .* has no metadata with captions"):
        load_data(arguments)


def test_captions_of_some_images_only_are_an_error(root):
    (root / "obs" / "000.txt").write_text("a face")
    with pytest.raises(ValueError, match="'hat', 'hat.rain', 'rain' has no captions, while other folders have"):
        load_folders(root)
    for image in list(CAPTIONS)[1:]:
        (root / image).with_suffix(".txt").write_text("a face")
    (root / "obs" / "001.txt").unlink()
    with pytest.raises(ValueError, match="obs' has no caption for '001.png'. Add one for each, or remove the images"):
        load_folders(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "metadata.csv' has no rows. Add a line for each image, or remove it"),
        (b'file_name,text\n000.png,"a\n', "Line 2 of .*metadata.csv' is not CSV .unexpected end of data"),
        (
            b"file_name,text\n000.png,a face, smiling\n",
            "Line 2 of .* more cells than the header: .* Put quotes around it",
        ),
        (b"file_name,label\n000.png,a\n", '"caption" will do for "text", and caption_column= names another'),
        (b"file_name,text\n000.png,\xff\n", "metadata.csv' is not UTF-8 .invalid start byte.. Save the file as UTF-8"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    write_folders(tmp_path, {"obs": 1})
    (tmp_path / "obs" / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_folders(tmp_path)


def test_a_caption_that_is_not_utf_8_is_named(root):
    (root / "obs" / "000.txt").write_bytes("\u00fc".encode("latin-1"))
    with pytest.raises(ValueError, match="obs/000.txt' is not UTF-8"):
        load_folders(root)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_read_is_counted_and_named(root, streaming):
    for name in ("obs/a.heic", "hat/b.HEIC", "hat/notes.txt", "README.md", ".hidden", "hat/.DS_Store", "license"):
        (root / name).write_bytes(b"something")
    write_image(root / "preview.png")
    (root / "hat" / "more").symlink_to(root / "obs", target_is_directory=True)
    expected = (
        "Files that are not read: 1 .md (README.md), 2 .heic (hat/b.HEIC, ...), 2 without a suffix (hat/more, ...), "
        "1 .txt (hat/notes.txt), 1 .png (preview.png)."
    )
    data = load_folders(root, streaming=streaming)
    assert data.warnings == (expected,)
    assert expected in check_data(data).warnings


def test_an_image_that_is_a_broken_link_is_not_left_out_silently(root):
    (root / "hat" / "lost.png").symlink_to(root / "nowhere.png")
    (error,) = check_data(load_folders(root)).errors
    assert "hat/lost.png (FileNotFoundError)" in error


def test_a_folder_that_cannot_be_read_is_not_left_out_silently(root, monkeypatch):
    write_image(root / "hat" / "more" / "0.png")
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="hat/more"):
        load_folders(root)


def test_a_folder_without_images_says_what_it_holds(root):
    (root / "sun").mkdir()
    for number in range(2):
        (root / "sun" / f"{number}.heic").write_bytes(b"something")
    with pytest.raises(
        ValueError, match="sun' has no images. Files that are not read: 2 .heic .0.heic, ....*Add images"
    ):
        load_folders(root)


def test_text_folders_tell_what_they_do_not_read(tmp_path):
    root = write_text_folders(tmp_path / "texts", "text")
    for name in ("obs/rows.csv", "obs/metadata.jsonl", "README.md"):
        (root / name).write_text("something")
    expected = "Files that are not read: 1 .md (README.md), 1 .jsonl (obs/metadata.jsonl), 1 .csv (obs/rows.csv)."
    assert load_text_folders(root).warnings == (expected,)
