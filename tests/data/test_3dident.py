"""3DIdent: the published folders, with hyphens between joint concepts, become interventional data."""

import numpy as np
import pytest
from PIL import Image

from examples.worlds.three_d_ident import CONCEPTS, FOLDERS, load_3dident
from hf_causal_context.data.folders import load_folders


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(FOLDERS):
        (tmp_path / name).mkdir()
        for i in range(number + 1):  # as many images as the folder's place, which is also their color
            Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(tmp_path / name / f"{i:05}.png")
    return tmp_path


def test_singles_are_trained_on_and_pairs_held_out(root):
    assert FOLDERS == ("obs", "bg", "obj", "sl", "bg-obj", "bg-sl", "obj-sl")
    data = load_3dident(root)
    assert data.concepts.names == CONCEPTS
    assert data.counts == {"": 1, "bg": 2, "obj": 3, "sl": 4}
    assert {context: len(rows) for context, rows in data.held_out.items()} == {"bg+obj": 5, "bg+sl": 6, "obj+sl": 7}
    for context, rows in [(None, data.rows), *data.held_out.items()]:
        for row in rows:
            assert context in (None, row["context"])
            image = np.asarray(row["image"])
            assert image.shape == (64, 64, 3)
            name = row["context"].replace("+", "-") or "obs"
            assert (image == FOLDERS.index(name)).all()


def test_streaming_reads_the_same_rows(root):
    stream = load_3dident(root, streaming=True)
    assert stream.streaming
    assert [row["context"] for row in stream.rows] == list(load_3dident(root).rows["context"])


def test_missing_and_surplus_folders_are_errors(root):
    with pytest.raises(FileNotFoundError, match="lacks the folders 'obs', 'bg', .* 'obj-sl'"):
        load_3dident(root / "nowhere")
    (root / "light").mkdir()
    Image.new("RGB", (64, 64)).save(root / "light" / "0.png")
    with pytest.raises(ValueError, match="Unknown concept 'light' .*Known concepts: 'bg', 'obj', 'sl'"):
        load_3dident(root)
    (root / "bg-sl").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match="lacks the folders 'bg-sl'. It must hold"):
        load_3dident(root)


def test_without_a_separator_a_hyphen_belongs_to_the_name(root):
    data = load_folders(root)
    assert "bg-obj" in data.concepts
    assert not data.held_out
    assert list(load_folders(root, joint_separator="-").held_out) == ["bg+obj", "bg+sl", "obj+sl"]
