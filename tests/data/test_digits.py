"""The digit world: its causal truth, and images that show it."""

import numpy as np
import pytest

from hf_causal_context.data.worlds.digits import CONCEPTS, LATENTS, read_attributes, sample_digits

THICKNESS, DARKNESS, SLANT, SIZE = range(4)


def latents(context, num=4000, seed=0):
    return LATENTS.sample(num, context, np.random.default_rng(seed))


def correlation(values, i, j):
    return np.corrcoef(values[:, i], values[:, j])[0, 1]


def test_thick_strokes_are_dark_until_darkness_is_intervened_on():
    assert correlation(latents(()), THICKNESS, DARKNESS) == pytest.approx(0.8, abs=0.03)
    assert correlation(latents("thickness"), THICKNESS, DARKNESS) > 0.4
    assert abs(correlation(latents("darkness"), THICKNESS, DARKNESS)) < 0.05
    assert latents("thickness")[:, DARKNESS].mean() == pytest.approx(0.8 * 1.5, abs=0.05)  # effects follow
    assert latents("darkness")[:, THICKNESS].mean() == pytest.approx(0, abs=0.05)  # causes do not


@pytest.mark.parametrize("concept", CONCEPTS)
def test_an_intervention_changes_its_concept_and_what_it_causes(concept):
    changed = latents(concept) != latents(())
    effects = {concept, "darkness"} if concept == "thickness" else {concept}
    for column, name in enumerate(CONCEPTS):
        assert changed[:, column].all() == (name in effects)
        assert changed[:, column].any() == (name in effects)


def test_combinations_do_not_depend_on_the_order_and_strength_scales():
    assert np.array_equal(latents("thickness+slant"), latents("slant+thickness"))
    half, full = latents({"size": 0.5}), latents("size")
    assert half[:, SIZE].mean() == pytest.approx(full[:, SIZE].mean() / 2, abs=0.05)


def test_images_show_the_latents():
    contexts = ["", *CONCEPTS]
    means = {}
    for context in contexts:
        images, classes, values = sample_digits(300, context, seed=3)
        assert images.shape == (300, 32, 32)
        assert images.dtype == np.uint8
        assert classes.shape == (300,)
        read = read_attributes(images)
        means[context] = np.nanmean(read, axis=0)
        if not context:
            for column in (DARKNESS, SLANT, SIZE):
                assert np.corrcoef(read[:, column], values[:, column])[0, 1] > 0.8
    assert means["thickness"][THICKNESS] > means[""][THICKNESS] + 0.7
    assert means["thickness"][DARKNESS] > means[""][DARKNESS] + 0.1
    assert means["darkness"][DARKNESS] < means[""][DARKNESS] - 0.15
    assert means["darkness"][THICKNESS] == pytest.approx(means[""][THICKNESS], abs=0.15)
    assert means["slant"][SLANT] > means[""][SLANT] + 0.2
    assert means["size"][SIZE] < means[""][SIZE] - 2


def test_the_same_seed_gives_counterfactual_pairs_and_other_glyphs_in_the_test_split():
    one, classes, _ = sample_digits(20, (), seed=1)
    again, _, _ = sample_digits(20, (), seed=1)
    assert np.array_equal(one, again)
    assert np.array_equal(classes, sample_digits(20, "slant", seed=1)[1])
    assert not np.array_equal(one, sample_digits(20, (), seed=1, split="test")[0])


def test_an_empty_image_has_no_attributes():
    assert np.isnan(read_attributes(np.zeros((1, 32, 32), np.uint8))).all()


def test_unknown_concepts_are_an_error():
    with pytest.raises(ValueError, match="This world has no concepts 'color'. It has: 'thickness', 'darkness'"):
        sample_digits(1, "color")
