"""What a user writes, and what travels in adapter_config.json: data, never code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

from peft.config import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from .._files import CONFIG, in_one_spelling
from ..contexts import ConceptSet, Context, refuse_obs
from ..errors import UserTypeError, UserValueError
from ..layers import (
    MECHANISMS,
    CausalLayer,
    ConceptGraph,
    IndependentLayer,
    Mechanism,
    ReducedLayer,
    StructuralLayer,
)
from ..messages.installation import installation
from ..messages.wording import short_repr
from .calibration import Calibration, calibrated_context, check_calibration
from .peft_type import CAUSAL_CONTEXT
from .plain_card import replace_card
from .storage import fields
from .storage.files import check_beside, read_fields
from .storage.layout import AdapterError, Layout

FORMAT_VERSION = 1
MAX_RANK = 16_384  # K x W
MAX_MIXED_RANK = 4_096  # where a layer holds an R x R or (depth, K, W, W) weight
MAX_EXPRESSIVE_DEPTH = 16
MAX_ALPHA = 1e6
# Fields of LoRA that users of PEFT look for.
_OF_LORA = {
    "r": "it is concept_rank, the width of each concept.",
    "lora_alpha": "it is alpha.",
    "lora_dropout": "it is dropout.",
    "target_parameters": "experts see tokens of several rows, and every context would need a copy of all experts' "
    "weights. Adapt attention and dense layers.",
}
OBSERVATIONAL_RANK = 4  # times that of a concept: data differs from a base by more than a concept does


@dataclass
class CausalContextConfig(PeftConfig):
    """Configuration of a causal context adapter.

    Args:
        concepts: names of the K concepts, in their fixed order; no "+", "=" or "," in them.
        concept_rank: width W of each concept; the adapter's rank is K x W.
        mechanism: "independent" (no mixing), "reduced" (total effects, the paper's) or "structural" (direct effects).
        alpha: scale; the adapter's output is multiplied by alpha / W. None: W, so that the factor is 1.
        observational_rank: rank of the observational part, which is on in every context, the empty one included, and
            learns what the data differs from the base by, so that no concept has to. 0: no such part, for a base that
            was trained on the observational set. None: 4 x concept_rank; of a stored adapter that does not say, 0.
        dropout: share of a module's input features that the adapter does not see, drawn anew in each pass of a
            training: LoRA's `lora_dropout`. It is off at inference.
        perfect_interventions: an intervened concept listens to no other concept. False: it still does.
        anchored: subtract the observational output, so that the concepts add nothing in the empty context.
            ("independent" always is.)
        expressive_depth: number of non-linear layers per concept. With 0 a context can be baked into a LoRA and merged.
        concept_graph: edges (cause, effect) between concepts. None: every concept may act on every other.
        concept_order: all concepts, causes before effects, instead of a graph.
        target_modules: names, a regular expression or "all-linear", as for LoRA. None: the architecture's attention.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: indices of the blocks to adapt. None: all.
        layers_pattern: name of the list of blocks the indices refer to, such as "layers".
        rank_pattern: module name or regular expression -> concept_rank, where it shall differ.
        modules_to_save: modules that are trained and saved whole. They act in every context, and without one, too.
        trainable_token_indices: rows of the input embedding (and of an output layer tied to it) that are trained, such
            as those of new tokens. They belong to the observational part: in force in every context, at its strength.
        component: the name in the pipeline of what is adapted, where its class does not tell: "transformer_2" is
            the denoiser of low noise of Wan 2.2.
        init_weights: False draws random weights instead of those that leave the base model unchanged (for tests).
        calibration: concept -> knots (dial, strength), from `evaluate --calibrate`; see `calibration.py`.
        format_version: of the stored adapter; leave it.

    Raises:
        TypeError: for concept names that are not strings, or unknown fields.
        ValueError: for anything else that is not allowed, whatever its type, or a newer `format_version`.

    Example:
        >>> CausalContextConfig(concepts=("thick", "slant"), target_modules=["to_q", "to_v"]).concept_rank
        4
    """

    concepts: tuple[str, ...] = ()
    concept_rank: int = 4
    mechanism: Mechanism = "independent"
    alpha: float | None = None
    observational_rank: int | None = None
    dropout: float = 0.0
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
    trainable_token_indices: list[int] | None = None
    component: str | None = None
    init_weights: bool = True
    calibration: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __new__(cls, *args: Any, **kwargs: Any) -> CausalContextConfig:
        # PEFT drops unknown fields of a stored config with a warning, which would load another adapter than was saved.
        # It does so when it reads "got an unexpected keyword argument", hence this check before __init__'s.
        _check_format_version(kwargs.get("format_version", FORMAT_VERSION))
        allowed = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(kwargs).difference(allowed))
        if unknown:
            of_lora = "".join(f" LoRA's {name}: {_OF_LORA[name]}" for name in unknown if name in _OF_LORA)
            raise UserTypeError(
                f"Unknown fields {short_repr(unknown)} in the adapter's config (format version {FORMAT_VERSION}). "
                f"Allowed: {', '.join(allowed)}. Correct the spelling, or upgrade hf_causal_context if a newer one "
                f"saved it.{of_lora}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        fields.check_peft_fields(self)  # before PEFT looks at them
        stored = self.peft_type is not None  # only files name it
        super().__post_init__()
        self.peft_type = CAUSAL_CONTEXT
        if isinstance(self.concepts, Mapping | Set):
            raise UserTypeError(f"concepts={short_repr(self.concepts)} has no order. Give a list of names.")
        self.concepts = ConceptSet(self.concepts).names
        if not stored:
            refuse_obs(self.concepts)
        if self.mechanism not in MECHANISMS:
            raise UserValueError(
                f"Unknown mechanism {short_repr(self.mechanism)}. Allowed: {', '.join(map(repr, MECHANISMS))}."
            )
        for name in ("perfect_interventions", "anchored", "init_weights"):
            fields.check_flag(name, getattr(self, name))
        fields.check_number("alpha", self.alpha, MAX_ALPHA)
        fields.check_share("dropout", self.dropout)
        fields.check_count("expressive_depth", self.expressive_depth, 0, MAX_EXPRESSIVE_DEPTH)
        self._check_rank("concept_rank", self.concept_rank)
        if self.observational_rank is None:
            # Adapters that were stored before there was such a part do not name it.
            self.observational_rank = 0 if stored else OBSERVATIONAL_RANK * self.concept_rank
        fields.check_count("observational_rank", self.observational_rank, 0, MAX_RANK)
        fields.check_patterns("rank_pattern", self.rank_pattern)
        for pattern, rank in self.rank_pattern.items():
            self._check_rank(f"rank_pattern[{pattern!r}]", rank)
        self._check_graph()
        self._check_modules()
        self._check_tokens()
        if isinstance(self.calibration, Mapping):
            self.calibration = {in_one_spelling(name): knots for name, knots in self.calibration.items()}
        check_calibration(self.calibration, self.concepts)

    def _check_rank(self, name: str, width: object) -> None:
        mixed = self.mechanism != "independent" or self.expressive_depth > 0
        limit = MAX_MIXED_RANK if mixed else MAX_RANK
        width = fields.check_count(name, width, 1, limit)
        if len(self.concepts) * width > limit:
            raise UserValueError(
                f"{len(self.concepts):,} concepts of {name}={width:,} make an adapter of rank "
                f"{len(self.concepts) * width:,}; at most {limit:,} is allowed"
                + (" for mechanisms that mix concepts or have expressive layers." if mixed else ".")
                + " Lower the rank, or divide the concepts among several adapters."
            )

    def _check_graph(self) -> None:
        if self.concept_graph is not None:
            edges = fields.check_list("concept_graph", self.concept_graph, "pairs (cause, effect)")
            self.concept_graph = tuple(_names("an edge of concept_graph", edge) for edge in edges)
        if self.concept_order is not None:
            self.concept_order = _names("concept_order", self.concept_order)
        if self.concept_graph is None and self.concept_order is None:
            return
        if self.mechanism == "independent":
            raise UserValueError(
                "mechanism='independent' does not mix concepts, so it takes no concept_graph or concept_order. Use "
                "'reduced' or 'structural', or leave them out."
            )
        self.graph()

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            fields.check_module_names(name, value, sets=True)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        if self.component is not None and not (isinstance(self.component, str) and self.component.isidentifier()):
            raise UserValueError(f"component={short_repr(self.component)} must be a name such as 'transformer_2'.")
        fields.check_module_names("layers_pattern", self.layers_pattern)
        fields.check_indices("layers_to_transform", self.layers_to_transform)
        fields.check_module_paths("modules_to_save", self.modules_to_save)
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise UserValueError(
                "layers_to_transform and layers_pattern cannot be used when target_modules is a string; put the blocks "
                "into the regular expression."
            )

    def _check_tokens(self) -> None:
        indices = self.trainable_token_indices
        fields.check_indices("trainable_token_indices", indices)
        if indices is None:
            return
        if isinstance(indices, int) or not indices or len(set(indices)) < len(indices):
            raise UserValueError(
                f"trainable_token_indices={short_repr(indices)} must be a list of rows of the embedding, each once."
            )
        if not self.observational_rank:
            raise UserValueError(
                "trainable_token_indices belong to the observational part, and with observational_rank=0 there is none."
                " Leave one of them out."
            )

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Return the fields in an adapter_config.json, not yet checked.

        Raises:
            AdapterError: for what is no JSON object of at most 1 MiB, or another kind of adapter.
        """
        return read_fields(path_json_file)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> CausalContextConfig:
        """Return the config in a folder or on the Hub; in a folder, weights beside it are compared with it.

        Raises:
            AdapterError: for weights that are damaged or belong to another config.
            TypeError, ValueError: see the class.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        assert isinstance(config, CausalContextConfig)  # read_fields refuses other kinds
        check_beside(pretrained_model_name_or_path, subfolder, config.layout())  # before PEFT makes layers of that size
        return config

    @classmethod
    def read(cls, folder: Path, source: str) -> CausalContextConfig:
        """Return the config of the adapter in a folder; weights beside it are not looked at.

        Args:
            folder: with adapter_config.json.
            source: what to call the adapter in messages.

        Raises:
            FileNotFoundError: without an adapter_config.json.
            AdapterError: for one that cannot be used.
        """
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{source} holds no adapter: there is no {CONFIG} in it.")
        stored = read_fields(folder / CONFIG, source)
        try:
            return cls(**stored)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"The config of {source} cannot be used. {error}") from error

    def layout(self) -> Layout:
        """Return what decides about the names and shapes of the weights."""
        by_base = self.target_modules in (None, "all-linear")
        return Layout(
            num_concepts=len(self.concepts),
            width=self.concept_rank,
            other_widths=tuple(self.rank_pattern.values()),
            observational_rank=cast(int, self.observational_rank),
            mechanism=self.mechanism,
            expressive_depth=self.expressive_depth,
            modules_to_save=tuple(self.modules_to_save or ()),
            num_tokens=len(self.trainable_token_indices or ()),
            adapts=None if by_base else partial(_adapts, self),
        )

    def rank_at(self, module: str) -> int:
        """Return the width W of each concept on a module of the base model, by its path."""
        pattern = get_pattern_key(list(self.rank_pattern), module) if self.rank_pattern else module
        return self.rank_pattern.get(pattern, self.concept_rank)

    def graph(self) -> ConceptGraph:
        """Which concepts may act on which."""
        return _graph(self.concepts, self.concept_graph, self.concept_order)

    def knots(self) -> Calibration:
        """Return the calibration of each concept, None for those without."""
        return {name: self.calibration.get(name) for name in self.concepts}

    def calibrated(self, context: Context) -> Context:
        """Return the context that is meant by one whose strengths are positions of dials; see `calibrated_context`."""
        return calibrated_context(context, self.knots())

    def causal_layer(self, width: int) -> CausalLayer:
        """Return a new layer that mixes the concepts, with `width` coordinates for each."""
        part = cast(int, self.observational_rank)
        if self.mechanism == "independent":
            return IndependentLayer(len(self.concepts), width, observational_rank=part)
        layer_cls = ReducedLayer if self.mechanism == "reduced" else StructuralLayer
        return layer_cls(
            len(self.concepts),
            width,
            self.graph(),
            perfect_interventions=self.perfect_interventions,
            anchored=self.anchored,
            observational_rank=part,
            identity=self.init_weights,
        )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and a card in place of the one that PEFT has just made, which says nothing."""
        super().save_pretrained(save_directory, **kwargs)
        replace_card(
            Path(save_directory),
            concepts=self.concepts,
            base=self.base_model_name_or_path,
            mechanism=self.mechanism,
            rank=self.concept_rank,
            observational_rank=self.observational_rank or 0,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data; sets come sorted, so that the same config always gives the same file."""
        return {key: sorted(v) if isinstance(v, set) else v for key, v in super().to_dict().items()}


def _adapts(config: CausalContextConfig, module: str) -> bool:
    return bool(check_target_module_exists(config, module))


def _names(name: str, value: object) -> tuple[str, ...]:
    """Names of concepts, as `ConceptSet` keeps them."""
    return tuple(map(in_one_spelling, fields.check_names(name, value)))


@lru_cache(maxsize=8)  # every layer asks for it
def _graph(
    concepts: tuple[str, ...], edges: tuple[tuple[str, ...], ...] | None, order: tuple[str, ...] | None
) -> ConceptGraph:
    return ConceptGraph(ConceptSet(concepts), edges, order)


def _check_format_version(version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserValueError(f"format_version={short_repr(version)} must be a whole number from 1 to {FORMAT_VERSION}.")
    if version > FORMAT_VERSION:
        raise UserValueError(
            f"This adapter has format version {short_repr(version)}; the installed hf_causal_context reads up to "
            f"{FORMAT_VERSION}. Upgrade it: {installation(upgrade=True)}"
        )
