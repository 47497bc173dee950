"""The adapter's layers as parameters and initialization; the equations are in `functional`.

Every class keeps its parameters directly on itself and registers no buffers: PEFT reads the adapter's name from the
last two parts of a parameter's name, and would save buffers.

Shapes: B rows, T tokens or pixels, K concepts, W width per concept, R = K W, N rank of the observational part,
S = N + R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from typing import ClassVar, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from . import functional as F
from .contexts import ConceptSet
from .errors import UserValueError
from .messages.wording import short_repr

Mechanism: TypeAlias = Literal["independent", "reduced", "structural"]
MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
MAX_EDGES = 100_000


class ConceptGraph:
    """Which concepts may act directly on which: all pairs, a user's edges, or whatever respects a user's order.

    Args:
        concepts: the concepts, in the order of the features.
        edges: pairs (cause, effect), or None.
        order: all concepts, causes before effects, or None.

    Raises:
        ValueError: for unknown concepts, an edge from a concept to itself, a cycle, an incomplete order, both given, or
            more than MAX_EDGES edges.
    """

    def __init__(
        self,
        concepts: ConceptSet,
        edges: Sequence[tuple[str, ...]] | None = None,
        order: Sequence[str] | None = None,
    ) -> None:
        K = len(concepts)
        if edges is not None and order is not None:
            raise UserValueError(
                "Give concept_graph or concept_order, not both: the graph's edges already imply an order."
            )
        if order is not None:
            if sorted(order) != sorted(concepts):
                raise UserValueError(
                    f"concept_order={short_repr(tuple(order))} must name every concept once: "
                    f"{short_repr(concepts.names)}, causes first."
                )
            edges = [(cause, effect) for i, cause in enumerate(order) for effect in order[i + 1 :]]
        elif edges is not None and len(edges) > MAX_EDGES:
            raise UserValueError(
                f"concept_graph has {len(edges):,} edges; at most {MAX_EDGES:,} are allowed. Where most concepts act "
                "on each other, give concept_order instead."
            )
        if edges is None:
            self.direct = ~torch.eye(K, dtype=torch.bool, device="cpu")
            self.total = self.direct
            self.longest_path = K - 1
            return
        parents: dict[int, set[int]] = {k: set() for k in range(K)}
        positions = {name: k for k, name in enumerate(concepts)}
        for edge in edges:
            if len(edge) != 2:
                raise UserValueError(f"Edge {short_repr(edge)} of concept_graph must be a pair (cause, effect).")
            for name in edge:
                if name not in positions:
                    concepts.index(name, f"edge {short_repr(tuple(edge))} of concept_graph")  # raises
            parents[positions[edge[1]]].add(positions[edge[0]])
        try:
            sequence = tuple(TopologicalSorter(parents).static_order())
        except CycleError as error:
            cycle = " -> ".join(concepts.names[k] for k in error.args[1])
            raise UserValueError(f"concept_graph has a cycle: {cycle}. Effects must not cause their causes.") from None
        # Graphs are kept and shared, so they do not lie where a `with torch.device(...)` says.
        self.direct = torch.zeros(K, K, dtype=torch.bool, device="cpu")  # row = effect, column = cause
        self.total = torch.zeros(K, K, dtype=torch.bool, device="cpu")
        depth: dict[int, int] = {}
        for k in sequence:
            causes = sorted(parents[k])
            self.direct[k, causes] = True
            self.total[k] = self.direct[k] | self.total[causes].any(0)
            depth[k] = 1 + max((depth[p] for p in causes), default=-1)
        self.longest_path = max(depth.values())

    @lru_cache(maxsize=8)  # noqa: B019 (graphs are few; all layers of an adapter ask for the same)
    def mask(self, effects: Literal["direct", "total"], width: int) -> Tensor:
        """1 where a matrix (R, R) of effects may have an entry, with `width` coordinates for each concept; else 0."""
        allowed: Tensor = getattr(self, effects)
        return allowed.repeat_interleave(width, 0).repeat_interleave(width, 1).float()


class RepresentationLayer(nn.Module):
    """Linear map from base features to the coordinates of the observational part and the K x W exogenous ones.

    For Linear layers and convolutions. Weight (S, in_features, *kernel); no bias, so that the adapter can become a
    plain LoRA. In training mode a share of the features is dropped out, as LoRA's dropout does.
    """

    def __init__(
        self, in_features: int, out_features: int, kernel_size: tuple[int, ...] = (), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.Parameter(torch.empty(out_features, in_features, *kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as LoRA's A

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """product(x, weight). Called, not only read: hooks that fetch an offloaded weight wait for a call."""
        if self.dropout and self.training:
            x = nn.functional.dropout(x, self.dropout)
        return product(x, self.weight)


class OutputLayer(nn.Module):
    """Linear map from the observational part and the K x W concepts back to the wrapped module's features.

    Weight (out_features, S). Zero-initialized: a fresh adapter leaves the base model as it is. `identity=False` draws
    random weights, for tests.
    """

    def __init__(self, in_features: int, out_features: int, identity: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        if not identity:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, c: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """product(c, weight); see `RepresentationLayer`."""
        return product(c, self.weight)


class ExpressiveLayer(nn.Module):
    """`depth` residual per-concept maps z <- z + gelu(V_d z); they start as the identity. Weight (depth, K, W, W)."""

    def __init__(self, num_concepts: int, width: int, depth: int, identity: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depth, num_concepts, width, width))
        if not identity:
            nn.init.normal_(self.weight, std=1 / math.sqrt(width))

    def forward(self, z_BTS: Tensor) -> Tensor:
        """(B, T, S) -> (B, T, S); the observational part, in front of the concepts, stays as it is."""
        part = z_BTS.shape[-1] - self.weight.shape[1] * self.weight.shape[2]
        if not part:
            return F.expressive(z_BTS, self.weight)
        return torch.cat([z_BTS[..., :part], F.expressive(z_BTS[..., part:], self.weight)], dim=-1)


class CausalLayer(nn.Module):
    """Mixes concepts under an intervention mask: the interface of the three mechanisms, all linear in the coordinates.

    `anchored` subtracts the observational output, c(m) - c(0), so that the empty context is exactly zero.

    With `observational_rank` N > 0 the first N of S = N + R coordinates are the observational part, which no concept
    mixes with: o z_o. Masks are then strengths (B, 1 + K) with o in front.
    """

    shift: Tensor  # (K, W, W), of those that mix; no parameter any more where FSDP or DataParallel put a copy there

    def __init__(self, num_concepts: int, width: int, anchored: bool = False, observational_rank: int = 0) -> None:
        super().__init__()
        self.num_concepts = num_concepts
        self.width = width
        self.anchored = anchored
        self.observational_rank = observational_rank
        # What layers have in common whose matrices are made together.
        self.kind: tuple[object, ...] = (type(self), num_concepts, width, anchored, observational_rank)

    def concepts(self, z_BTR: Tensor, mask: Tensor) -> Tensor:
        """Concepts c(m) before anchoring, (B, T, R), for exogenous coordinates (B, T, R) and a mask (B or 1, K)."""
        raise NotImplementedError

    def forward(self, z_BTS: Tensor, mask: Tensor) -> Tensor:
        """What the adapter adds, before its output layer: o z_o, then c(m), or c(m) - c(0) when anchored; (B, T, S)."""
        mask = F.per_feature(mask, z_BTS, self.observational_rank)
        features = z_BTS.shape[-1]
        if z_BTS.numel() <= features * features * len(mask):
            return self._with_observational_part(z_BTS, mask)
        # With more tokens of a context than features, a product with its matrix is less work than all steps.
        (matrices,) = self.matrices([self], mask.view(-1, features))
        return F.row_linear(z_BTS, matrices.to(z_BTS.dtype))

    @classmethod
    def matrices(cls, layers: Sequence[CausalLayer], mask: Tensor) -> Tensor:
        """M(m)^T of layers that are alike in all but their weights, with forward(z, m) = z M(m)^T: (L, C, S, S).

        Args:
            layers: L of this class, with the same `kind`.
            mask: (C, K), strengths (C, 1 + K), or what `functional.per_feature` makes of either, (C, S).
        """
        first = layers[0]
        N, R = first.observational_rank, first.num_concepts * first.width
        weight = first.shift
        mask = F.per_feature(mask.to(weight.dtype), weight.new_empty(1, N + R), N)
        own = mask[:, N:]
        asked = torch.cat([own, torch.zeros_like(own[:1])]) if first.anchored else own
        matrices = cls._matrices_of_concepts(layers, asked)
        if first.anchored:  # as `_anchored_concepts`
            matrices = (matrices[:, :-1] - matrices[:, -1:]) * (own != 0).any(-1)[:, None, None]
        matrices = matrices.mT
        if N:
            diagonal = torch.diag_embed(torch.nn.functional.pad(mask[:, :N], (0, R)))
            matrices = torch.nn.functional.pad(matrices, (N, 0, N, 0)) + diagonal
        return matrices

    @classmethod
    def _matrices_of_concepts(cls, layers: Sequence[CausalLayer], mask_CR: Tensor) -> Tensor:
        """M(m) of the concepts before anchoring, (L, C, R, R)."""
        raise NotImplementedError

    def _with_observational_part(self, z_BTS: Tensor, mask: Tensor) -> Tensor:
        N = self.observational_rank
        if not N:
            return self._anchored_concepts(z_BTS, mask)
        c_BTR = self._anchored_concepts(z_BTS[..., N:], mask[..., N:])
        return torch.cat([z_BTS[..., :N] * mask[..., :N], c_BTR], dim=-1)

    def _anchored_concepts(self, z_BTR: Tensor, mask: Tensor) -> Tensor:
        c_BTR = self.concepts(z_BTR, mask)
        if not self.anchored:
            return c_BTR
        anchor = self.concepts(z_BTR, torch.zeros_like(mask[:1]))
        # The product makes rows of the empty context exactly zero, whatever the two calls rounded.
        return (c_BTR - anchor) * (mask != 0).any(-1, keepdim=True)

    def matrix(self, mask: Tensor) -> Tensor:
        """The (S, S) matrix M(m) with forward(z, m) = M(m) z, for the one context of a mask (1, K) or (1, 1 + K)."""
        weight = next(self.parameters(), mask)
        features = self.observational_rank + self.num_concepts * self.width
        identity = torch.eye(features, dtype=weight.dtype, device=weight.device)
        return self(identity[None], mask.to(weight.device))[0].T


class IndependentLayer(CausalLayer):
    """c_k = m_k z_k. No parameters: the representation and output layers absorb a map of the concept's own."""

    def concepts(self, z_BTR: Tensor, mask: Tensor) -> Tensor:
        return F.independent(z_BTR, mask)

    def forward(self, z_BTS: Tensor, mask: Tensor) -> Tensor:
        # Anchored already, and the observational part is nothing but more features with a strength of their own.
        return F.per_feature(mask, z_BTS, self.observational_rank) * z_BTS


class _MixingLayer(CausalLayer):
    """What `reduced` and `structural` share: the shift of an intervention, and matrices of allowed effects.

    Args:
        graph: which concepts may act on which.
        perfect_interventions: an intervened concept listens to no other concept.
        identity: the matrices begin at zero, so that nothing is mixed; else they are random.
    """

    _effects: ClassVar[Literal["direct", "total"]]  # which of the graph's
    _matrices: ClassVar[tuple[str, ...]]  # names of the parameters (R, R)

    def __init__(
        self,
        num_concepts: int,
        width: int,
        graph: ConceptGraph,
        *,
        perfect_interventions: bool = True,
        anchored: bool = False,
        observational_rank: int = 0,
        identity: bool = True,
    ) -> None:
        super().__init__(num_concepts, width, anchored, observational_rank)
        # U_ivn - U_obs = 1: without mixing, c(m) = (1 + m) z, and anchored c(m) = m z: it starts as `independent`.
        self.shift = nn.Parameter(torch.eye(width).repeat(num_concepts, 1, 1))
        self._allowed: Tensor
        # A buffer moves with the model; made by the first call, a move would compile that call twice.
        self.register_buffer("_allowed", graph.mask(self._effects, width), persistent=False)
        self.perfect_interventions = perfect_interventions
        self.steps = graph.longest_path
        self.kind = (*self.kind, perfect_interventions, self.steps)
        features = num_concepts * width
        for name in self._matrices:
            weight = torch.zeros(features, features)
            if not identity:
                nn.init.normal_(weight, std=1 / math.sqrt(features))
            self.register_parameter(name, nn.Parameter(weight))

    def _allowed_effects(self, weight_RR: Tensor) -> Tensor:
        return weight_RR * self._allowed.to(weight_RR)


class ReducedLayer(_MixingLayer):
    """The paper's reduced form: total effects, one matrix for observed and one for intervened causes."""

    _effects = "total"
    _matrices = ("observational", "interventional")
    observational: nn.Parameter
    interventional: nn.Parameter

    def concepts(self, z_BTR: Tensor, mask: Tensor) -> Tensor:
        return F.reduced(
            F.intervened(z_BTR, mask, self.shift),
            mask,
            self._allowed_effects(self.observational),
            self._allowed_effects(self.interventional),
            perfect_interventions=self.perfect_interventions,
        )

    @classmethod
    def _matrices_of_concepts(cls, layers: Sequence[CausalLayer], mask_CR: Tensor) -> Tensor:
        first = cast(ReducedLayer, layers[0])
        observational, interventional = (
            first._allowed_effects(_stacked(layers, name)) for name in ("observational", "interventional")
        )
        shift = _stacked(layers, "shift")
        return F.reduced_matrices(mask_CR, shift, observational, interventional, first.perfect_interventions)


class StructuralLayer(_MixingLayer):
    """One matrix of direct effects; an intervention cuts the rows of its targets, and every combination follows."""

    _effects = "direct"
    _matrices = ("coefficients",)
    coefficients: nn.Parameter

    def concepts(self, z_BTR: Tensor, mask: Tensor) -> Tensor:
        return F.structural(
            F.intervened(z_BTR, mask, self.shift),
            mask,
            self._allowed_effects(self.coefficients),
            steps=self.steps,
            perfect_interventions=self.perfect_interventions,
        )

    @classmethod
    def _matrices_of_concepts(cls, layers: Sequence[CausalLayer], mask_CR: Tensor) -> Tensor:
        first = cast(StructuralLayer, layers[0])
        coefficients = first._allowed_effects(_stacked(layers, "coefficients"))
        shift = _stacked(layers, "shift")
        return F.structural_matrices(mask_CR, shift, coefficients, first.steps, first.perfect_interventions)

    def acyclicity_penalty(self) -> Tensor:
        """Scalar, zero when the learned direct effects have no cycle; add it to the loss when no graph is given."""
        return F.acyclicity_penalty(self._allowed_effects(self.coefficients), self.num_concepts)


def _stacked(layers: Sequence[nn.Module], name: str) -> Tensor:
    weights = [cast(Tensor, getattr(layer, name)) for layer in layers]
    return weights[0][None] if len(weights) == 1 else torch.stack(weights)
