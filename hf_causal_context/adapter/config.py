"""What a user writes, and what travels in adapter_config.json: data, never code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from ..contexts import ConceptSet
from ..layers import MECHANISMS, ConceptGraph, Mechanism
from .registration import CAUSAL_CONTEXT

FORMAT_VERSION = 1


@dataclass
class CausalContextConfig(PeftConfig):
    """Configuration of a causal context adapter.

    Args:
        concepts: names of the K concepts, in their fixed order; no "+", "=" or "," in them.
        concept_rank: width W of each concept; the adapter's rank is K x W.
        mechanism: "independent" (no mixing), "reduced" (total effects, the paper's) or "structural" (direct effects).
        alpha: scale; the adapter's output is multiplied by alpha / W. None: W, so that the factor is 1.
        perfect_interventions: an intervened concept listens to no other concept. False: it still does.
        anchored: subtract the observational output, so that the empty context is exactly the base model.
            ("independent" always is.)
        expressive_depth: number of non-linear layers per concept. With 0 a context can be baked into a LoRA and merged.
        concept_graph: edges (cause, effect) between concepts. None: every concept may act on every other.
        concept_order: all concepts, causes before effects, instead of a graph.
        target_modules: names, a regular expression or "all-linear", as for LoRA. None: the architecture's attention.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: indices of the blocks to adapt. None: all.
        layers_pattern: name of the list of blocks the indices refer to, such as "layers".
        rank_pattern: module name or regular expression -> concept_rank, where it shall differ.
        modules_to_save: modules that are trained and saved whole.
        init_weights: False draws random weights instead of those that leave the base model unchanged (for tests).
        format_version: of the stored adapter; leave it.

    Raises:
        TypeError: for concept names that are not strings, or unknown fields.
        ValueError: for anything else that is not allowed, or a newer `format_version`.

    Example:
        >>> CausalContextConfig(concepts=("thick", "slant"), target_modules=["to_q", "to_v"]).concept_rank
        4
    """

    concepts: tuple[str, ...] = ()
    concept_rank: int = 4
    mechanism: Mechanism = "independent"
    alpha: float | None = None
    perfect_interventions: bool = True
    anchored: bool = False
    expressive_depth: int = 0
    concept_graph: tuple[tuple[str, ...], ...] | None = None
    concept_order: tuple[str, ...] | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    format_version: int = FORMAT_VERSION

    def __new__(cls, *args: Any, **kwargs: Any) -> CausalContextConfig:
        # PEFT drops unknown fields of a stored config with a warning, which would load another adapter than was saved.
        # It does so when it reads "got an unexpected keyword argument", hence this check before __init__'s.
        _check_format_version(kwargs.get("format_version", FORMAT_VERSION))
        allowed = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(kwargs).difference(allowed))
        if unknown:
            raise TypeError(
                f"Unknown fields {unknown} in the adapter's config (format version {FORMAT_VERSION}). Allowed: "
                f"{', '.join(allowed)}. Correct the spelling, or upgrade hf_causal_context if a newer one saved it."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CAUSAL_CONTEXT
        self.concepts = ConceptSet(self.concepts).names
        _check_count("concept_rank", self.concept_rank, minimum=1)
        _check_count("expressive_depth", self.expressive_depth, minimum=0)
        for pattern, rank in self.rank_pattern.items():
            _check_count(f"rank_pattern[{pattern!r}]", rank, minimum=1)
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"Unknown mechanism {self.mechanism!r}. Allowed: {', '.join(map(repr, MECHANISMS))}.")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha!r} must be a positive number, or None for a factor of 1.")
        self._check_graph()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError(
                "layers_to_transform and layers_pattern cannot be used when target_modules is a string; put the blocks "
                "into the regular expression."
            )

    def _check_graph(self) -> None:
        if self.concept_graph is not None:
            self.concept_graph = tuple(tuple(edge) for edge in self.concept_graph)
        if self.concept_order is not None:
            self.concept_order = tuple(self.concept_order)
        if self.concept_graph is None and self.concept_order is None:
            return
        if self.mechanism == "independent":
            raise ValueError(
                "mechanism='independent' does not mix concepts, so it takes no concept_graph or concept_order. Use "
                "'reduced' or 'structural', or leave them out."
            )
        self.graph()

    def graph(self) -> ConceptGraph:
        """Which concepts may act on which."""
        return ConceptGraph(ConceptSet(self.concepts), self.concept_graph, self.concept_order)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; sets come sorted, so that the same config always gives the same file."""
        return {key: sorted(v) if isinstance(v, set) else v for key, v in super().to_dict().items()}


def _check_format_version(version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"format_version={version!r} must be a whole number from 1 to {FORMAT_VERSION}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"This adapter has format version {version}; the installed hf_causal_context reads up to {FORMAT_VERSION}. "
            "Upgrade it: pip install --upgrade hf-causal-context."
        )


def _check_count(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}.")
