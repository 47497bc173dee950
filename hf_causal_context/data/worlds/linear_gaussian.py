"""Linear Gaussian structural causal models: the latent variables of the worlds.

    v_i = sum_j a_ij v_j + s_i eps_i, which an intervention replaces by v_i = strength * mean_i + spread_i eps_i

Shapes: N samples, V variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter

import numpy as np
from numpy.typing import NDArray

from ...contexts import ContextLike, as_context
from ...errors import UserValueError
from ...messages.wording import quoted


class LinearGaussianModel:
    """A structural causal model, and what interventions do to it.

    Args:
        names: the variables, in the order of the columns.
        effects: (cause, effect) -> coefficient a.
        deviations: s of every variable, in the order of `names`.
        interventions: variable -> (mean, spread) under an intervention of strength 1. Others cannot be intervened on.
    """

    def __init__(
        self,
        names: Sequence[str],
        effects: Mapping[tuple[str, str], float],
        deviations: Sequence[float],
        interventions: Mapping[str, tuple[float, float]],
    ) -> None:
        self.names = tuple(names)
        self.interventions = dict(interventions)
        self._deviations = dict(zip(self.names, deviations, strict=True))
        self._parents = {name: {cause: a for (cause, effect), a in effects.items() if effect == name} for name in names}
        self._order = tuple(TopologicalSorter(self._parents).static_order())

    def sample(self, num: int, context: ContextLike, rng: np.random.Generator) -> NDArray[np.float64]:
        """Draw rows (num, V) under a context; the noise does not depend on it, so rows are counterfactuals.

        Raises:
            ValueError: for a variable that cannot be intervened on.
        """
        strengths = as_context(context).strengths
        if unknown := sorted(set(strengths).difference(self.interventions)):
            raise UserValueError(f"This world has no concepts {quoted(unknown)}. It has: {quoted(self.interventions)}.")
        noise = {name: rng.standard_normal(num) for name in self.names}
        values: dict[str, NDArray[np.float64]] = {}
        for name in self._order:
            if name in strengths:
                mean, spread = self.interventions[name]
                values[name] = strengths[name] * mean + spread * noise[name]
            else:
                own = self._deviations[name] * noise[name]
                values[name] = sum((a * values[cause] for cause, a in self._parents[name].items()), start=own)
        return np.stack([values[name] for name in self.names], axis=1)

    def log_ratio(self, values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        """Return log p(values | do(name)) - log p(values), (num,), at rows (num, V).

        Args:
            values: of all variables, in the order of `names`.
            name: of a variable that can be intervened on.
        """
        own = values[:, self.names.index(name)]
        parents = sum(a * values[:, self.names.index(cause)] for cause, a in self._parents[name].items())
        mean, spread = self.interventions[name]
        deviation = self._deviations[name]
        observed, intervened = (own - parents) / deviation, (own - mean) / spread
        return 0.5 * observed**2 - 0.5 * intervened**2 + np.log(deviation / spread)

    def causes(self, name: str) -> frozenset[str]:
        """All variables that a path leads from to this one."""
        direct = self._parents[name]
        return frozenset(direct).union(*map(self.causes, direct))

    def deviations(self) -> NDArray[np.float64]:
        """Standard deviations (V,) of the observational distribution, whose means are 0."""
        size = len(self.names)
        coefficients = np.zeros((size, size))
        for i, name in enumerate(self.names):
            for cause, a in self._parents[name].items():
                coefficients[i, self.names.index(cause)] = a
        total = np.linalg.inv(np.eye(size) - coefficients) * np.array([self._deviations[name] for name in self.names])
        return np.sqrt(np.square(total).sum(axis=1))
