"""Why selecting rows is not intervening: what else changes when sentences are rewritten, and when they are selected.

    python -m examples.reviews.selection --data_dir movie_reviews

A set that was made by intervening differs from the observational one in its concept and in what that concept causes; a
set that was made by selecting (positive reviews) also differs in the causes of being selected, and in all that goes
with them. An adapter would learn these differences as if they were the concept, and carry them into every combination.
"""

import argparse
from pathlib import Path

import numpy as np

from ..worlds.reviews import CONCEPTS, read_sentences, select_positive, write_reviews

# What sentences have besides the four concepts.
WORDS: dict[str, tuple[str, ...]] = {
    "a negation": ("n't ", " not ", " no ", " never "),
    "'film'": ("film",),
    "'movie'": ("movie",),
    "'and'": (" and ",),
}


def rates(reviews: tuple[list[str], np.ndarray]) -> np.ndarray:
    """Share of reviews with each concept, and with each of WORDS."""
    texts, shown = reviews
    found = [[any(word in text.lower() for word in words) for text in texts] for words in WORDS.values()]
    return np.array([*shown.mean(0), *np.mean(found, axis=1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    sentences = read_sentences(parser.parse_args().data_dir)
    positive = select_positive(sentences)
    size = len(positive)
    observational = rates(write_reviews(sentences, size, seed=1))
    sets = {f"do({concept})": write_reviews(sentences, size, concept, seed=2) for concept in CONCEPTS}
    sets["selected: positive"] = write_reviews(positive, size, seed=2)
    print(f"| set of {size} | " + " | ".join([*CONCEPTS, *WORDS]) + " |\n|---|" + "---|" * 8)
    print("| observational | " + " | ".join(f"{rate:.2f}" for rate in observational) + " |")
    for name, reviews in sets.items():
        own = rates(reviews)
        pooled = (own + observational) / 2
        # A share of 0 or 1 in both has no deviation, and no difference either.
        spread = np.sqrt(2 * pooled * (1 - pooled) / size)
        deviations = np.divide(own - observational, spread, out=np.zeros_like(spread), where=spread > 0)
        cells = [f"**{r:.2f}**" if abs(z) > 4 else f"{r:.2f}" for r, z in zip(own, deviations, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nBold: more than four standard errors from the observational set.")


if __name__ == "__main__":
    main()
