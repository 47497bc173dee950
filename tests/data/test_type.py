"""The world of type: its causal truth, images that show it, and fonts that it cannot use."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib.tables.TupleVariation import TupleVariation
from PIL import ImageFont

from examples.worlds.type import CHARACTERS, CONCEPTS, RESOLUTION, latent_model, sample_type

WEIGHT, WIDTH, SLANT, CONTRAST = range(4)
AXES = {
    "wght": (100, 400, 900, "Weight"),
    "wdth": (50, 100, 200, "Width"),
    "slnt": (-10, 0, 0, "Slant"),
    "CTRS": (0, 0, 100, "Contrast"),
}
OUTER, INNER = [(0, 0), (0, 600), (400, 600), (400, 0)], [(60, 60), (340, 60), (340, 540), (60, 540)]


def write_font(path):
    """A font with the axes of Science Gothic, whose characters are all the same frame."""
    pen = TTGlyphPen(None)
    for corners in (OUTER, INNER):
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
    glyph = pen.glyph()
    inward = [(0, 0)] * 4 + [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    wider = [(x > 200, 0) for x, _ in OUTER + INNER]

    def variation(axis, peak, deltas, advance=0):
        region = {axis: (min(peak, 0), peak, max(peak, 0))}
        return TupleVariation(region, [*deltas, (0, 0), (advance, 0), (0, 0), (0, 0)])  # the last four: its metrics

    def scaled(deltas, x, y):
        return [(x * dx, y * dy) for dx, dy in deltas]

    variations = [
        variation("wght", 1, scaled(inward, 90, 90)),
        variation("wght", -1, scaled(inward, -40, -40)),
        variation("wdth", 1, scaled(wider, 250, 0), 250),
        variation("wdth", -1, scaled(wider, -150, 0), -150),
        variation("slnt", -1, [(y // 5, 0) for _, y in OUTER + INNER]),
        variation("CTRS", 1, scaled(inward, 0, -50)),
    ]
    names = [".notdef", "frame"]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(character): "frame" for character in CHARACTERS})
    font.setupGlyf(dict.fromkeys(names, glyph))
    font.setupHorizontalMetrics(dict.fromkeys(names, (400, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Frames", "styleName": "Regular"})
    font.setupFvar([(tag, *axis) for tag, axis in AXES.items()], [])
    font.setupGvar({"frame": variations})
    font.setupOS2()
    font.setupPost()
    font.save(path)


@pytest.fixture(scope="module")
def fonts_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fonts")
    write_font(folder / "ScienceGothic.ttf")
    return folder


def latents(context, dependent=True, num=4000):
    return latent_model(dependent).sample(num, context, np.random.default_rng(0))


def correlation(values, i, j):
    return np.corrcoef(values[:, i], values[:, j])[0, 1]


def test_bold_type_is_wide_until_its_width_is_intervened_on():
    assert correlation(latents(()), WEIGHT, WIDTH) == pytest.approx(0.8, abs=0.03)
    assert latents("weight")[:, WIDTH].mean() == pytest.approx(0.8 * 1.5, abs=0.05)  # effects follow
    assert abs(correlation(latents("width"), WEIGHT, WIDTH)) < 0.05
    assert latents("width")[:, WEIGHT].mean() == pytest.approx(0, abs=0.05)  # causes do not


def test_without_the_law_weight_has_no_effect():
    assert abs(correlation(latents((), dependent=False), WEIGHT, WIDTH)) < 0.05
    assert latents("weight", dependent=False)[:, WIDTH].mean() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_an_intervention_changes_its_concept_and_what_it_causes(concept):
    changed = latents(concept) != latents(())
    effects = {concept, "width"} if concept == "weight" else {concept}
    for column, name in enumerate(CONCEPTS):
        assert changed[:, column].all() == (name in effects)
        assert changed[:, column].any() == (name in effects)


def test_the_truth_of_a_pair_is_what_both_of_its_concepts_do(fonts_dir):
    drawn = {c: sample_type(50, c, fonts_dir=fonts_dir) for c in ("", "weight", "width", "width+weight")}
    truth = drawn[""][1].copy()
    truth[:, WEIGHT] = drawn["weight"][1][:, WEIGHT]
    truth[:, WIDTH] = drawn["width"][1][:, WIDTH]  # and not what weight causes
    np.testing.assert_array_equal(drawn["width+weight"][1], truth)
    assert extent(drawn["width+weight"][0]).mean() < extent(drawn["weight"][0]).mean() - 2
    assert ink(drawn["width+weight"][0]).mean() > 1.3 * ink(drawn["width"][0]).mean()


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.5])
def test_the_truth_is_known_at_every_strength(strength):
    full, scaled = latents("slant"), latents({"slant": strength})
    np.testing.assert_allclose(scaled[:, SLANT], full[:, SLANT] + 1.5 * (strength - 1))


def ink(images):
    return images.mean(axis=(1, 2))


def extent(images):
    """Width of the ink in pixels."""
    return (images.max(axis=1) > 60).sum(axis=1)


def shear(images):
    """How far to the right the ink of the upper half lies."""
    columns = np.arange(RESOLUTION)
    upper, lower = images[:, : RESOLUTION // 2].sum(axis=1), images[:, RESOLUTION // 2 :].sum(axis=1)
    return upper @ columns / upper.sum(axis=1) - lower @ columns / lower.sum(axis=1)


def test_images_show_what_is_intervened_on(fonts_dir):
    drawn = {name: sample_type(100, name, seed=3, fonts_dir=fonts_dir)[0] for name in ("", *CONCEPTS)}
    assert drawn[""].shape == (100, RESOLUTION, RESOLUTION)
    assert drawn[""].dtype == np.uint8
    assert not drawn["weight"][:, :, [0, -1]].any()  # nothing is cut, even of wide type
    plain = drawn[""]
    assert ink(drawn["weight"]).mean() > 1.3 * ink(plain).mean()
    assert extent(drawn["weight"]).mean() > extent(plain).mean() + 1  # bold type is set wider
    assert extent(drawn["width"]).mean() < extent(plain).mean() - 1
    assert shear(drawn["slant"]).mean() > shear(plain).mean() + 0.5
    assert ink(drawn["contrast"]).mean() < ink(plain).mean()


def test_a_seed_gives_the_same_images_and_no_images_are_none(fonts_dir):
    images, _ = sample_type(5, seed=4, fonts_dir=fonts_dir)
    np.testing.assert_array_equal(sample_type(5, seed=4, fonts_dir=fonts_dir)[0], images)
    assert sample_type(0, fonts_dir=fonts_dir)[0].shape == (0, RESOLUTION, RESOLUTION)


def test_a_folder_without_the_font_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no ScienceGothic.ttf in .* Download the font"):
        sample_type(1, fonts_dir=tmp_path)


def test_a_font_without_the_axes_is_said(tmp_path):
    (tmp_path / "ScienceGothic.ttf").write_bytes(ImageFont.load_default(size=20).path.getvalue())
    with pytest.raises(ValueError, match=r"has the axes \[\]; this world needs \['weight', .* Take the variable font"):
        sample_type(1, fonts_dir=tmp_path)


def test_an_unknown_concept_is_said(fonts_dir):
    with pytest.raises(ValueError, match=r"This world has no concepts 'bold'. It has: 'weight'"):
        sample_type(1, "bold", fonts_dir=fonts_dir)
