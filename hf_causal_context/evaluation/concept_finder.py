"""Which texts show all concepts of a combination, of which there are no true texts to learn from.

Shapes: N texts, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..contexts import ConceptSet, Context
from .classifiers import RELIABLE_ACCURACY, ConceptClassifier, balanced_accuracy, train_classifier
from .ngrams import Ngrams

_HELD_OUT = 5  # every fifth text of a set tells whether a classifier is to be believed
_APART = 3.0  # standard errors by which a feature's mean differs


class ConceptFinder:
    """Classifiers of the sets of single concepts, each blind to what the other concepts of a combination change.

    Next to capitals, a classifier that reads letters in lower case would never find the words of another concept.

    Args:
        texts: of the observational context, and of each concept alone at strength 1.
        seed: of the classifiers' training.
    """

    def __init__(self, texts: Mapping[Context, Sequence[str]], seed: int) -> None:
        self._seed = seed
        self._features = Ngrams(text for own in texts.values() for text in own)
        self._sets = {context: self._features(own) for context, own in texts.items()}
        self._known: dict[tuple[str, Context], tuple[ConceptClassifier, Tensor, float]] = {}

    def unclear(self, combination: Context) -> list[str]:
        """Return the concepts of a combination that texts do not tell reliably."""
        return [name for name in combination.targets if self._classifier(name, combination)[2] < RELIABLE_ACCURACY]

    def find(self, combination: Context, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts show all concepts of a combination (N,)."""
        features = self._features(texts)
        found = np.ones(len(texts), dtype=bool)
        for name in combination.targets:
            classifier, columns, _ = self._classifier(name, combination)
            found &= (classifier.read(features[:, columns])[:, 0] > 0).numpy()
        return found

    def _classifier(self, name: str, combination: Context) -> tuple[ConceptClassifier, Tensor, float]:
        """Return what finds a concept beside the others, the features that it reads, and its balanced accuracy."""
        if (name, combination) not in self._known:
            others = [Context(other) for other in combination.targets if other != name]
            columns = ~torch.stack([self._changed(other) for other in others]).any(0)
            sets = {context: self._sets[context][:, columns] for context in (Context(), Context(name))}
            held_out = {context: rows[::_HELD_OUT] for context, rows in sets.items()}
            trained = {context: rows[torch.arange(len(rows)) % _HELD_OUT > 0] for context, rows in sets.items()}
            one = ConceptSet((name,))
            classifier = train_classifier(trained, one, self._seed, linear=True)
            accuracy = balanced_accuracy({context: classifier.read(rows) for context, rows in held_out.items()}, one)
            self._known[name, combination] = classifier, columns, accuracy[name]
        return self._known[name, combination]

    def _changed(self, context: Context) -> Tensor:
        """Which features an intervention changes (D,)."""
        rows, observational = self._sets[context], self._sets[Context()]
        error = (rows.var(0) / len(rows) + observational.var(0) / len(observational)).sqrt().clamp(min=1e-9)
        return (rows.mean(0) - observational.mean(0)).abs() > _APART * error
