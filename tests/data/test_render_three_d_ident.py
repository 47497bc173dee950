"""Rendered stand-ins for 3DIdent: latents by their causal model, images by their latents, the same ones every time."""

import colorsys
import sys

import numpy as np
import pytest
from PIL import Image

from examples.paper import render_three_d_ident as rendering
from examples.paper.render_three_d_ident import LATENTS, NAMES, render, sample_latents
from examples.worlds.three_d_ident import FOLDERS, load_3dident


def test_an_intervention_moves_the_latents_of_its_concept_and_cuts_their_causes():
    num = 20_000
    obs = sample_latents(num, "obs")
    assert obs.shape == (num, len(NAMES))
    np.testing.assert_allclose(obs.mean(0), 0.5, atol=0.02)  # uniform
    np.testing.assert_allclose(obs.std(0), 12**-0.5, atol=0.02)
    intervened = sample_latents(num, "obj")
    moved = np.abs(intervened.mean(0) - 0.5) > 0.2
    # The effects of the object's place and turn on the light's place nearly cancel.
    assert [name for name, far in zip(NAMES, moved, strict=True) if far] == [*LATENTS["obj"], "light_hue"]
    floor, hue = NAMES.index("floor_hue"), NAMES.index("object_hue")
    assert np.corrcoef(obs.T)[floor, hue] > 0.5
    assert abs(np.corrcoef(intervened.T)[floor, hue]) < 0.03


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("mitsuba")
    root = tmp_path_factory.mktemp("3dident")
    render(root, 2, seed=0, side=16)
    return root


def test_the_floor_has_the_hue_of_its_latent(folder):
    for name in FOLDERS:
        for i, row in enumerate(sample_latents(2, name)):
            with Image.open(folder / name / f"{i:05d}.png") as image:
                corner = np.array(image)[0, 0] / 255
            hue = colorsys.rgb_to_hsv(*corner)[0]
            assert hue == pytest.approx(5 / 6 * row[NAMES.index("floor_hue")], abs=0.05)


def test_the_table_reads_the_folders(folder):
    data = load_3dident(folder)
    assert data.counts == {"": 2, "bg": 2, "obj": 2, "sl": 2}
    assert set(data.held_out) == {"bg+obj", "bg+sl", "obj+sl"}


def test_images_are_the_same_every_time_and_only_missing_ones_are_made(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    assert len(before) == 14
    path = folder / "bg-sl" / "00001.png"
    path.unlink()
    untouched = folder / "obs" / "00000.png"
    changed = untouched.stat().st_mtime_ns
    render(folder, 2, seed=0, side=16)
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    assert untouched.stat().st_mtime_ns == changed
    with pytest.raises(ValueError, match="holds images of another --seed or --num_images"):
        render(folder, 2, seed=1, side=16)


def test_a_missing_renderer_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(ImportError, match="Rendering needs mitsuba: pip install mitsuba"):
        rendering.main(["--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
