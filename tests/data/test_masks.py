"""Masks of images: beside them in folders, in a column of datasets; bad ones are named before any training."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_causal_context.data import check_data, load_folders
from hf_causal_context.data.arguments import DataArguments
from hf_causal_context.data.from_arguments import load_data
from tests.data.small import write_folders, write_image

COUNTS = {"obs": 2, "hat": 2}


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "data", COUNTS)


def write_mask(path, size=(4, 4), left=255, mode="L"):
    pixels = np.zeros(size[::-1], dtype=np.uint8)
    pixels[:, : size[0] // 2] = left
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def paths(data, root):
    rows = data.rows.cast_column("mask", ImageFeature(decode=False)).cast_column("image", ImageFeature(decode=False))
    names = [
        [value and str(Path(value["path"]).relative_to(root)) for value in rows[name]] for name in ("image", "mask")
    ]
    return dict(zip(*names, strict=True))


def test_a_mask_belongs_to_the_image_of_its_name_and_is_none_itself(root):
    write_mask(root / "hat" / "000.mask.png")
    data = load_folders(root)
    assert data.counts == {"": 2, "hat": 2}
    expected = dict.fromkeys(["obs/000.png", "obs/001.png", "hat/001.png"])
    assert paths(data, root) == expected | {"hat/000.png": "hat/000.mask.png"}
    assert "1 of 4 images have a mask. Of the others, all counts." in data.warnings
    assert not check_data(data).errors


def test_without_masks_there_is_no_column(root):
    assert not load_folders(root).has_masks


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_a_dataset_or_a_stream(root, tmp_path, streaming):
    pixels = [[[0, 255], [9, 0]]] * 3
    images = [Image.fromarray(np.array(value, dtype=np.uint8)) for value in pixels]
    columns = {"image": images, "context": ["obs", "hat", "hat"], "where": [*images[:2], None], "mask": ["x"] * 3}
    table = Dataset.from_dict(columns).cast_column("image", ImageFeature()).cast_column("where", ImageFeature())
    table.save_to_disk(tmp_path / "saved")
    given = {"dataset_name": str(tmp_path / "saved"), "streaming": streaming, "concepts": ["hat"]}
    data = load_data(DataArguments(**given, mask_column="where"))
    masks = [row["mask"] and np.asarray(row["mask"]).tolist() for row in data.rows]
    assert masks == [*pixels[:2], None]
    assert not load_data(DataArguments(**given)).has_masks  # a column that happens to have the name is none
    with pytest.raises(ValueError, match="The column 'mask' holds Value.*, not masks. Name another mask_column=, or"):
        load_data(DataArguments(**given, mask_column="mask"))
    with pytest.raises(ValueError, match="no column 'nowhere' .mask_column=."):
        load_data(DataArguments(**given, mask_column="nowhere"))


def test_a_mask_without_its_image_is_refused(root):
    write_mask(root / "hat" / "00.mask.png")
    message = "00.mask.png' has the name of a mask, but there is no image '00' beside it, such as '00.png'"
    with pytest.raises(ValueError, match=message):
        load_folders(root)


def test_folders_take_no_column_of_masks(root):
    with pytest.raises(
        ValueError, match="--mask_column='mask' is for datasets. In folders, put a.mask.png beside a.png"
    ):
        load_data(DataArguments(train_data_dir=str(root), mask_column="mask"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"left": 0}, "its mask is black everywhere, so that nothing would be learned. Remove the image."),
        ({"size": (4, 2)}, "its mask is 4 x 2 pixels, the image 4 x 4."),
    ],
)
def test_bad_masks_are_named_before_the_training(root, bad, message):
    write_mask(root / "hat" / "000.mask.png", **bad)
    (error,) = check_data(load_folders(root)).errors
    assert "hat/000.png" in error
    assert message in error


def test_a_transparent_mask_is_named(root):
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(root / "hat" / "000.mask.png")
    (error,) = check_data(load_folders(root)).errors
    assert "hat/000.png (its mask is transparent in places. Save it in black and white.)" in error


def test_an_unreadable_mask_is_named(root):
    (root / "hat" / "000.mask.png").write_bytes(b"no image")
    (error,) = check_data(load_folders(root)).errors
    assert "hat/000.png (its mask cannot be read: UnidentifiedImageError)" in error


def test_the_digest_of_data_is_that_of_its_masks_and_pairs_too(root):
    mask = root / "hat" / "000.mask.png"
    plain, paired = (check_data(load_folders(root, paired_files=value)).digest for value in (False, True))
    digests = {plain, paired}
    for left in (255, 254):
        write_mask(mask, left=left)
        digests.add(check_data(load_folders(root)).digest)
    assert len(digests) == 4


def test_a_photo_that_was_turned_and_its_upright_mask_fit(root):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(root / "hat" / "turned.jpg", exif=exif)
    write_mask(root / "hat" / "turned.mask.png", size=(4, 6))
    write_image(root / "hat" / "other.png")
    assert not check_data(load_folders(root)).errors
