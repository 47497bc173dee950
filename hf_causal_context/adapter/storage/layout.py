"""Which weights an adapter's file must hold: their names and shapes follow from a few numbers of its config."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...errors import UserValueError
from ...messages.wording import short_repr
from ..peft_type import PREFIX

MAX_MATCHING_SECONDS = 5.0
TOKENS = ".token_adapter.trainable_tokens_delta"  # what the names of trained rows of an embedding end with, by PEFT
_MIXED_UP = "Its files belong to different adapters, or are damaged."


class AdapterError(UserValueError):
    """A stored adapter that cannot be used: what is wrong with it, and the remedy."""


class StoredTensor(NamedTuple):
    """What the header of a file says about a tensor."""

    shape: tuple[int, ...]
    floating: bool


@dataclass(frozen=True)
class Layout:
    """What of a config decides about names and shapes.

    Attributes:
        num_concepts: K.
        width: W of each concept, where no pattern says otherwise.
        other_widths: what patterns say.
        observational_rank: N.
        mechanism: "independent", "reduced" or "structural".
        expressive_depth: number of non-linear layers per concept.
        modules_to_save: modules that are stored whole.
        num_tokens: trained rows of the input embedding.
        adapts: whether PEFT would adapt the module of a path; None where only the base tells.
    """

    num_concepts: int
    width: int
    other_widths: tuple[int, ...]
    observational_rank: int
    mechanism: str
    expressive_depth: int
    modules_to_save: tuple[str, ...]
    num_tokens: int
    adapts: Callable[[str], bool] | None

    def shapes(self, width: int, inputs: tuple[int, ...], outputs: int) -> dict[str, tuple[int, ...]]:
        """Return the weights of an adapter on a module of the base, "down.weight" and so on, and their shapes.

        Args:
            width: W of each concept on this module.
            inputs: features that go into the module, and its kernel if it is a convolution.
            outputs: features that come out.
        """
        K, W, R = self.num_concepts, width, self.num_concepts * width
        S = self.observational_rank + R
        shapes: dict[str, tuple[int, ...]] = {"down.weight": (S, *inputs), "up.weight": (outputs, S)}
        if self.expressive_depth:
            shapes["expressive.weight"] = (self.expressive_depth, K, W, W)
        if self.mechanism != "independent":
            shapes["causal.shift"] = (K, W, W)
            matrices = ("observational", "interventional") if self.mechanism == "reduced" else ("coefficients",)
            shapes |= {f"causal.{name}": (R, R) for name in matrices}
        return shapes

    def check(self, tensors: Mapping[str, StoredTensor], source: str, others: Sequence[str] = ()) -> None:
        """Refuse names and shapes that do not follow from the config, whatever the base.

        Args:
            tensors: what a file holds, by names in the base model.
            source: what to call the adapter in messages.
            others: names in the paths of further modules whose weights may lie beside it.

        Raises:
            AdapterError: naming a tensor that is missing, or should not be there as it is.
        """
        modules: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in tensors.items():
            module, separator, weight = name.rpartition(f".{PREFIX}")
            if separator:
                modules.setdefault(module, {})[weight] = tensor
        if not modules:
            raise AdapterError(f"{source}: its file holds no weights of a causal context adapter.")
        self._check_tokens({name: tensor for name, tensor in tensors.items() if name.endswith(TOKENS)}, source)
        for name in tensors:
            if f".{PREFIX}" not in name and not name.endswith(TOKENS):
                self._check_whole_module(name, source, others)
        for module, stored in modules.items():
            self._check_module(module, stored, source)

    def check_targets(self, tensors: Mapping[str, StoredTensor], source: str) -> None:
        """Refuse weights of modules that PEFT, by the config, would not adapt: it would leave them out.

        Raises:
            AdapterError: naming the module, or for patterns that take too long.
        """
        if self.adapts is None:
            return
        end = time.monotonic() + MAX_MATCHING_SECONDS  # names in a file can be made for patterns to take long
        for module in {name.rpartition(f".{PREFIX}")[0] for name in tensors if f".{PREFIX}" in name}:
            if not self.adapts(module):
                raise AdapterError(
                    f"{source} has weights for {short_repr(module)}, which its config does not ask for. {_MIXED_UP}"
                )
            if time.monotonic() > end:
                raise AdapterError(
                    f"{source}: its target_modules or exclude_modules take too long to match. List names."
                )

    def _check_module(self, module: str, stored: Mapping[str, StoredTensor], source: str) -> None:
        down, up = (stored[name].shape if name in stored else () for name in ("down.weight", "up.weight"))
        # Which of them it is, only the names of the base's modules tell: those in the file are not matched with
        # patterns.
        sizes = {self.observational_rank + self.num_concepts * W: W for W in (self.width, *self.other_widths)}
        width = sizes.get(down[0], self.width) if down else self.width
        declared = self.shapes(width, down[1:], up[0] if up else 0)
        unasked = [f"{module}.{PREFIX}{weight}" for weight in stored if weight not in declared]
        missing = [f"{module}.{PREFIX}{weight}" for weight in declared if weight not in stored]
        if unasked:
            raise AdapterError(
                f"{source} has a tensor {short_repr(unasked[0])}, which its config does not ask for. {_MIXED_UP}"
            )
        if missing:
            raise not_whole(source, missing)
        for weight, (shape, floating) in stored.items():
            name = short_repr(f"{module}.{PREFIX}{weight}")
            if not floating:
                raise AdapterError(f"{source}: the tensor {name} is not of a floating-point type. {_MIXED_UP}")
            if shape != declared[weight]:
                raise AdapterError(
                    f"{source}: the tensor {name} has the shape {shape}; by its config {declared[weight]}. {_MIXED_UP}"
                )

    def _check_tokens(self, stored: Mapping[str, StoredTensor], source: str) -> None:
        if self.num_tokens and not stored:
            raise not_whole(source, [TOKENS[1:]])
        for number, (name, (shape, floating)) in enumerate(stored.items()):
            if number or not floating or len(shape) != 2 or shape[0] != self.num_tokens:
                raise AdapterError(
                    f"{source} has a tensor {short_repr(name)} of shape {shape}, and its config asks for "
                    f"{self.num_tokens} trained tokens. {_MIXED_UP}"
                )

    def _check_whole_module(self, name: str, source: str, others: Sequence[str]) -> None:
        module = name.rpartition(".")[0]
        inside = any(module.endswith(saved) or f"{saved}." in name for saved in self.modules_to_save)
        if not inside and (".base_layer" in name or not any(other in module for other in others)):
            raise AdapterError(
                f"{source} has a tensor {short_repr(name)}, which is no weight of the adapter: it could replace one "
                f"of the base model. {_MIXED_UP}"
            )


def not_whole(source: str, missing: Sequence[str]) -> AdapterError:
    """Return the error for weights that a config asks for and a file lacks."""
    return AdapterError(
        f"{source} is not whole: it lacks {len(missing):,} weights that its config asks for, such as "
        f"{', '.join(map(short_repr, missing[:3]))}. It was trained for another base, its files belong to different "
        "adapters, or it was saved in part."
    )
