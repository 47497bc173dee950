"""What is said about a base: near, not quite or far, and a warning where only the concepts learn the difference."""

import pytest

from hf_causal_context.bases.gap import FAR, NEAR, BaseGap

FAR_IMAGES = BaseGap("images", 0.081, 0.034, 32)
FAR_TEXTS = BaseGap("texts", 31.2, 9.5, 32)
NEAR_IMAGES = BaseGap("images", 0.0511, 0.0482, 32)


def test_a_far_base_is_said_to_be_far_with_advice():
    assert FAR_IMAGES.advice(None) == (
        "The base is far from your observational set (loss 0.081 on it, 0.034 on its own samples: 2.4 times): the "
        "observational part will learn the difference; give it more --observational_steps or a larger "
        "--observational_rank."
    )
    assert FAR_IMAGES.advice(4) == FAR_IMAGES.advice(None)
    assert "(perplexity 31.2 on it, 9.5 on its own texts: 3.3 times)" in FAR_TEXTS.advice(None)


def test_a_near_base_is_said_to_be_near():
    assert NEAR_IMAGES.advice(None) == (
        "The base already makes images like your observational set (loss 0.0511 on it, 0.0482 on its own samples: 1.1 "
        "times): the observational part has little to learn."
    )
    assert NEAR_IMAGES.advice(0).endswith("no observational part is needed.")


@pytest.mark.parametrize("times", [(NEAR + FAR) / 2, FAR, 2 * FAR, 1 / FAR])
def test_without_an_observational_part_anything_but_a_near_base_is_a_warning(times):
    gap = BaseGap("images", 0.1 * times, 0.1, 32)
    assert gap.advice(0).startswith("WARNING: The base is ")
    assert gap.advice(0).endswith("come out worse than the base itself. Leave --observational_rank out.")
    assert "Expect them to fail.**" in gap.note(0)
    assert "WARNING" not in gap.advice(None) + gap.advice(4)
    assert "**" not in gap.note(4)


def test_a_set_that_is_too_simple_for_the_base_is_as_far_as_one_that_is_too_hard():
    simple, hard = BaseGap("images", 0.01, 0.03, 32), BaseGap("images", 0.03, 0.01, 32)
    assert [simple.factor, hard.factor] == pytest.approx([3, 3])
    assert ": 0.33 times)" in simple.advice(None)
    assert "far from" in simple.advice(None)


def test_between_near_and_far_the_sentence_is_between():
    gap = BaseGap("images", 0.15, 0.1, 32)
    assert gap.advice(None).startswith("The base is not quite your observational set (")
    assert gap.advice(None).endswith("the observational part will learn the difference.")


def test_what_is_stored_is_what_is_read(tmp_path):
    assert BaseGap.load(tmp_path) is None
    (tmp_path / "base_gap.json").write_text(FAR_TEXTS.json())
    assert BaseGap.load(tmp_path) == FAR_TEXTS
