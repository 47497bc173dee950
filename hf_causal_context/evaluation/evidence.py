"""What an evaluation measures on: readings of samples, of the base and of real rows, gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contexts import ConceptSet, Context
from ..errors import UserValueError
from .readings import Measurements
from .results import Perplexity

MIN_REAL_ROWS = 10
_ALIKE = 1e-6  # standard deviation of an attribute that does not vary, and its share of a large one
_JUDGED_SHARE = 0.3  # of the real rows; the classifiers are trained on the others


@dataclass(frozen=True)
class EvaluationInputs:
    """Readings of real rows, and of samples in one or more seed groups.

    Attributes:
        concepts: the adapter's.
        real: per context, those with few rows too.
        samples: per context, one reading for each seed group.
        base: the same for the base; its seeds are those of the empty context.
        strengths: concept -> strength -> readings from the same seeds, which are the base's first ones.
        trained: the contexts that were trained on.
        largest_change, mean_change: of the empty context from the base, per pixel or entry; 0 for texts.
        attribute_names: of the attributes in the readings, if any.
        perplexities: of real texts per context; None where rows are no texts.

    Raises:
        ValueError: for too few real rows of the observational context or of a single concept.
    """

    concepts: ConceptSet
    real: Mapping[Context, Measurements]
    samples: Mapping[Context, Sequence[Measurements]]
    base: Sequence[Measurements]
    strengths: Mapping[str, Mapping[float, Measurements]]
    trained: frozenset[Context]
    largest_change: float
    mean_change: float
    attribute_names: tuple[str, ...]
    perplexities: Mapping[Context, Perplexity] | None = None

    def __post_init__(self) -> None:
        check_real_rows(self.concepts, {context: len(rows) for context, rows in self.real.items()})

    @property
    def holds_texts(self) -> bool:
        """Whether values are those of texts: too many and too coarse for distances."""
        return self.perplexities is not None

    def usable(self) -> dict[Context, Measurements]:
        """Return the contexts with enough real rows to compare with, and these rows."""
        return {context: rows for context, rows in self.real.items() if len(rows) >= MIN_REAL_ROWS}

    def split(self, seed: int) -> tuple[dict[Context, Tensor], dict[Context, Tensor]]:
        """Values of usable rows: to train the classifiers on, and to judge them and the world by."""
        learned, judged = {}, {}
        for context, rows in self.usable().items():
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            cut = round(len(rows) * _JUDGED_SHARE)
            judged[context], learned[context] = rows.values[order[:cut]], rows.values[order[cut:]]
        return learned, judged

    def standardized(self, attributes: Tensor) -> Tensor:
        """Attributes (N, A) in standard deviations of the observational real rows; as they are if these are alike."""
        observational = self.real[Context()].attributes
        assert observational is not None
        seen = observational[~observational.isnan().any(1)]
        if len(seen) < 2:  # no standard deviation
            return torch.full_like(attributes, torch.nan)
        deviation = seen.std(0)
        varies = deviation > _ALIKE * seen.abs().amax(0).clamp(min=1)  # more than by rounding
        return (attributes - seen.mean(0)) / torch.where(varies, deviation, 1.0)


def check_real_rows(concepts: ConceptSet, counts: Mapping[Context, int]) -> None:
    """Refuse data without enough rows of the contexts that everything else is compared with.

    Raises:
        ValueError: naming the context and its number of rows.
    """
    for context in (Context(), *map(Context, concepts)):
        if (num := counts.get(context, 0)) < MIN_REAL_ROWS:
            raise UserValueError(
                f"The context {str(context) or '(observational)'!r} has {num} real rows. At least {MIN_REAL_ROWS} are "
                "needed of the observational context and of every single concept, to train the classifiers and to "
                "measure leakage. Add rows."
            )
