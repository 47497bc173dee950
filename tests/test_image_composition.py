"""The benchmark of combinations in images: its worlds, its peers, and the shares of samples that are exact."""

import re
from itertools import combinations

import numpy as np
import pytest
import torch

from examples.benchmarks import image_worlds
from examples.benchmarks.image_composition_methods import Study, lora_scales
from examples.benchmarks.image_composition_table import table
from examples.benchmarks.image_worlds import edit_world
from examples.worlds.edits import CONCEPTS, sample_edits
from hf_causal_context import Context
from hf_causal_context.data.worlds.digits import sample_digits
from hf_causal_context.quickstart import BASE


def test_edits_are_of_the_same_digits_and_do_not_depend_on_their_order():
    plain, framed, inverted, both = (sample_edits(4, c, 3) for c in ("", "framed", "inverted", "framed+inverted"))
    assert np.array_equal(plain, sample_digits(4, (), 3)[0])
    assert np.array_equal(255 - plain, inverted)
    inside = (slice(None), slice(2, -2), slice(2, -2))
    assert np.array_equal(framed[inside], plain[inside])
    assert (framed[:, :2] == 128).all()
    assert (framed[:, :, -2:] == 128).all()
    assert np.array_equal(both[inside], inverted[inside])
    assert (both[:, :2] == 128).all()
    striped, with_both = sample_edits(4, "striped", 3), sample_edits(4, "striped+inverted", 3)
    assert np.array_equal(255 - striped, with_both)
    assert not striped[:, 2:4].any()
    assert np.array_equal(striped[:, 4:6], plain[:, 4:6])


def test_an_edit_is_made_or_not():
    with pytest.raises(ValueError, match=re.escape("at strength 1; received 'framed=0.5'")):
        sample_edits(1, "framed=0.5")


def test_a_classifier_tells_all_edits_of_an_image_and_no_other(monkeypatch):
    monkeypatch.setattr(image_worlds, "_CLASSIFIED", 60)
    world = edit_world()
    assert [len(group) for group in world.groups.values()] == [3, 3, 1]
    for size in range(4):
        for names in combinations(CONCEPTS, size):
            context = Context(*names)
            assert world.exact(context, world.floor(context, 20)) > 0.9
    striped = world.floor(Context("striped"), 20)
    assert world.exact(Context("striped", "framed"), striped) == world.exact(Context(), striped) == 0
    assert not torch.equal(world.floor(Context(), 4), world.truth(Context(), 4))


def test_a_few_images_of_each_combination(tmp_path):
    study = Study(edit_world(), BASE, tmp_path, rows_per_context=32, num_samples=1, seed=0)
    few, oracle = study.few_data, study.oracle_data
    assert {few.counts[str(c)] for c in study.world.trained} == {32}
    assert {few.counts[str(c)] for c in study.world.seen_by_oracle if c not in study.world.trained} == {30}
    assert few.contexts == oracle.contexts
    assert np.array_equal(few.rows[-1]["image"], oracle.rows[-3]["image"])


def test_loras_act_at_the_strengths_of_a_context():
    context = Context({"weight": 0.25, "slant": 1.5})
    assert lora_scales(context, subtract=False) == {"weight": 0.25, "slant": 1.5}
    assert lora_scales(context, subtract=True) == {"weight": 0.25, "slant": 1.5, "observational": -0.75}
    assert lora_scales(Context(), subtract=True) == {"observational": 1.0}


def test_the_table_says_how_often_samples_show_what_was_asked_for():
    world = edit_world()
    names = [str(context) for context in world.contexts]
    runs = [
        {"distances": dict.fromkeys(names, 0.1 * seed), "exact": dict.fromkeys(names, 1.0 - 0.5 * seed)}
        for seed in range(2)
    ]
    lines = table("digits", {("oracle", 300): runs}, world).splitlines()
    assert lines[0] == "Base digits, 2 seeds:"
    assert lines[2].endswith("| worst combination | exact obs | exact singles | exact pairs | exact triple |")
    assert "| 0.0500 ± 0.0707 |" in lines[4]
    assert lines[4].endswith("| 0.7500 ± 0.3536 |")
