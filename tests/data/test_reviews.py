"""The world of film reviews: what is written is what the concepts say, and an intervention changes nothing else."""

import numpy as np
import pytest

from examples.worlds.reviews import CONCEPTS, Sentence, read_sentences, select_positive, write_reviews

WORDS = [
    *("a", "warm", "and", "clever", "film", "about", "two", "brothers"),
    *("who", "lose", "their", "way", "at", "sea"),
]
SENTENCES = [Sentence(" ".join(np.random.default_rng(i).permutation(WORDS)), i % 2 == 0) for i in range(50)]


def shown(text: str) -> tuple[bool, ...]:
    body, critic = text.lower().split(" -- ")
    question = body.endswith("?")
    words = len(body.split()) - 1 - (4 if question else 0)  # without the mark, and what makes it a question
    return text.isupper(), question, words < 8, critic == "ebert"


@pytest.mark.parametrize("context", ["", "shouting", "question+brief", "shouting+question+brief+ebert"])
def test_texts_show_the_concepts_that_are_reported(context):
    texts, truth = write_reviews(SENTENCES, 300, context, seed=1)
    assert [shown(text) for text in texts] == [tuple(row) for row in truth.tolist()]


def test_an_intervention_sets_its_concept_and_what_that_causes():
    _, natural = write_reviews(SENTENCES, 4000, seed=3)
    for k, concept in enumerate(CONCEPTS):
        _, truth = write_reviews(SENTENCES, 4000, concept, seed=4)
        assert truth[:, k].all()
        others = [j for j in range(4) if j != k and (concept, CONCEPTS[j]) != ("shouting", "brief")]
        np.testing.assert_allclose(truth[:, others].mean(0), natural[:, others].mean(0), atol=0.04)
    assert write_reviews(SENTENCES, 4000, "shouting")[1][:, 2].mean() == pytest.approx(0.4, abs=0.03)
    # Loud reviews are brief; brief ones are not loud.
    assert write_reviews(SENTENCES, 4000, "brief")[1][:, 0].mean() == pytest.approx(0.15, abs=0.03)


def test_the_same_seed_writes_the_same_reviews_in_another_context():
    plain, natural = write_reviews(SENTENCES, 60, seed=5)
    loud, truth = write_reviews(SENTENCES, 60, "shouting", seed=5)
    same_length = natural[:, 2] == truth[:, 2]
    assert same_length.any()
    assert [t.upper() for t, same in zip(plain, same_length, strict=True) if same] == [
        t for t, same in zip(loud, same_length, strict=True) if same
    ]


def test_every_sentence_is_used_once_before_any_is_used_again():
    texts, _ = write_reviews(SENTENCES, 50, "ebert", seed=0)
    first = {" ".join(text.lower().split()[:30]) for text in texts}
    assert len(first) == 50


def test_sentences_are_read_cleaned_and_shuffled_the_same_way(tmp_path):
    good, bad = "This film is ONE of the best of all time .", "nobody should sit through these two hours twice . \x96"
    (tmp_path / "rt-polarity.pos").write_text(f"{good}\ntoo short\nis it one of the best of all time ?\n", "latin-1")
    (tmp_path / "rt-polarity.neg").write_text(f"{bad}\n{bad}\n", "latin-1")
    sentences = read_sentences(tmp_path)
    assert set(sentences) == {
        Sentence("this film is one of the best of all time", True),
        Sentence("nobody should sit through these two hours twice", False),
    }
    assert sentences == read_sentences(tmp_path)
    assert [sentence.text for sentence in select_positive(sentences)] == ["this film is one of the best of all time"]


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no .*rt-polarity.pos. Give the folder"):
        read_sentences(tmp_path)
    with pytest.raises(ValueError, match="Unknown concept 'quiet'"):
        write_reviews(SENTENCES, 2, "quiet")
