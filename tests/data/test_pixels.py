"""Images with more in them than a model sees: how they are read, and what is said of it."""

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_causal_context.bases.images import read_image
from hf_causal_context.data import check_data, from_dataset, load_folders
from tests.data.small import write_folders

LEVELS = [[0, 128, 257 * 3, 257 * 100 + 1], [32768, 40000, 65407, 65535]]
IN_8_BITS = [[0, 0, 3, 100], [128, 156, 255, 255]]  # rounded


def saved(path, image, **options):
    image.save(path, **options)
    return Image.open(path)


def see_through(mode):
    """Red where it is opaque, hidden green where it is transparent, and a blue that is half transparent."""
    pixels = np.array([[[255, 0, 0, 255], [0, 255, 0, 0]], [[0, 0, 255, 128], [0, 255, 0, 0]]], dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_to_8(tmp_path, suffix, channels):
    image = saved(tmp_path / f"deep.{suffix}", Image.fromarray(np.array(LEVELS * 2, np.uint16)))
    assert read_image(image, channels, 4).tolist() == [IN_8_BITS * 2] * channels


def test_big_endian_16_bits_are_scaled_too():
    image = Image.frombytes("I;16B", (4, 4), np.array(LEVELS * 2, ">u2").tobytes())
    assert read_image(image, 1, 4).tolist() == [IN_8_BITS * 2]


def test_what_is_transparent_is_white_and_not_its_hidden_color(tmp_path):
    expected = [[[255, 0, 0], [255, 255, 255]], [[127, 127, 255], [255, 255, 255]]]
    assert read_image(saved(tmp_path / "a.png", see_through("RGBA")), 3, 2).transpose(1, 2, 0).tolist() == expected
    assert read_image(saved(tmp_path / "a.png", see_through("RGBA")), 1, 2)[0, :, 1].tolist() == [255, 255]
    gray = Image.fromarray(np.array([[[9, 255], [9, 0]]] * 2, np.uint8), "LA")
    assert read_image(saved(tmp_path / "b.png", gray), 1, 2).tolist() == [[[9, 255], [9, 255]]]
    # A palette, or a plain image, of which one color stands for nothing.
    palette = Image.fromarray(np.array([[0, 1]] * 2, np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    shown = read_image(saved(tmp_path / "c.png", palette, transparency=1), 3, 2)
    assert shown[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]
    plain = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]] * 2, np.uint8))
    shown = read_image(saved(tmp_path / "d.png", plain, transparency=(0, 255, 0)), 3, 2)
    assert shown[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]


def test_an_opaque_image_is_as_it_was():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    assert np.array_equal(read_image(Image.fromarray(pixels).convert("RGBA"), 3, 4), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(("dtype", "held"), [(np.float32, "floating point numbers"), (np.int32, "32-bit integers")])
def test_numbers_without_a_white_are_refused(tmp_path, dtype, held):
    image = saved(tmp_path / "raw.tif", Image.fromarray(np.full((4, 4), 1, dtype)))
    message = f"The image '.*raw.tif' holds {held}, and nothing says which of them .* Save it with 8 or 16 bits"
    with pytest.raises(ValueError, match=message):
        read_image(image, 3, 4)


def test_colors_that_pillow_does_not_convert_are_refused(tmp_path):
    image = saved(tmp_path / "print.tif", Image.new("LAB", (4, 4)))
    with pytest.raises(ValueError, match="The image '.*print.tif' is in the color space Lab, .* Save it in RGB"):
        read_image(image, 3, 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_check_data_says_it_once_with_a_count(tmp_path, streaming):
    root = write_folders(tmp_path, {"obs": 50, "a": 50})
    for number in range(3):
        Image.fromarray(np.full((4, 4), 1000 + number, np.uint16)).save(root / "a" / f"deep{number}.png")
    for number in range(6):
        image = see_through("RGBA")
        image.putpixel((0, 0), (number, 0, 0, 255))
        image.save(root / "obs" / f"clear{number}.png")
    Image.fromarray(np.full((2, 2, 4), 255, np.uint8)).save(root / "obs" / "opaque.png")
    frames = [Image.fromarray(np.full((4, 4), level, np.uint8)) for level in (0, 200)]
    frames[0].save(root / "a" / "moving.gif", save_all=True, append_images=frames[1:])
    for size in ((1, 5), (16, 4)):
        Image.new("RGB", size, "red").save(root / "a" / f"{size[0]}.png")
    report = check_data(load_folders(root, streaming=streaming))
    assert report.errors == ()
    warnings = {warning.partition(" (")[0]: warning for warning in report.warnings}
    deep, clear = (warnings[f"{count} images"] for count in (3, 6))
    long, moving = (warning for warning in report.warnings if warning.startswith("1 images"))
    assert long.endswith(
        "1.png) are over 4 times as long as wide. Only their middle is used; cut them to what is to be learned."
    )
    assert deep.endswith("deep2.png) have 16 bits per channel. They are scaled to 8.")
    assert clear.endswith(
        "clear4.png and 1 more) are transparent in places. These are white; put the images on another background if it "
        "is wrong."
    )
    assert moving.endswith("moving.gif) have several frames. Only the first is used.")

    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(root / "a" / "float.tif")
    (error,) = check_data(load_folders(root, streaming=streaming)).errors
    assert error.startswith("1 images cannot be read: ")
    assert "float.tif (The image holds floating point numbers, and nothing says which" in error


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_rgb_images_is_read_alike(tmp_path, streaming):
    paths = []
    for number in range(2):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(np.array(LEVELS * 2, np.uint16)).save(paths[-1])
    rows = Dataset.from_dict({"image": paths, "context": ["obs", "a"]}).cast_column("image", ImageFeature(mode="RGB"))
    data = from_dataset(rows.to_iterable_dataset() if streaming else rows, concepts=("a",))
    for row in data.rows:
        assert read_image(row["image"], 3, 4).tolist() == [IN_8_BITS * 2] * 3
