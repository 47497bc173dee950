"""Reads out of an adapter how concepts influence each other, and which layers carry them. It is not a causal graph.

Shapes: L layers, K concepts, W width per concept, R = K W.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..errors import MissingPackageError, UserValueError
from ..layers import OutputLayer, RepresentationLayer
from ..messages.installation import installation
from .layer import CausalContextLayer
from .lookup import adapted_layers
from .peft_type import PEFT_PREFIX

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_NAME = 48  # characters of a layer's name in an image


@dataclass(frozen=True)
class CausalEffects:
    """Sizes of the paths from concept j's coordinates (column) to concept i's output (row), per layer.

    `observational` (L, K, K): in the empty context. `interventional` (L, K, K): column j under an intervention on j
    alone. The number is the Frobenius norm of Up_i M_ij Down_j, times the adapter's scale.

    `changes` (L, K): how much do(k) changes each layer: the Frobenius norm of W(do(k)) - W(no intervention), over that
    of the layer's frozen weight, so that layers compare. W(m), the weight in a context, is the frozen one plus
    Up M(m) Down. Without mixing this is the diagonal of `interventional`. All are float32 on the CPU.
    """

    concepts: tuple[str, ...]
    layers: tuple[str, ...]
    observational: Tensor
    interventional: Tensor
    changes: Tensor

    def mean(self) -> tuple[Tensor, Tensor]:
        """Observational and interventional effects averaged over layers, (K, K) each."""
        return self.observational.mean(0), self.interventional.mean(0)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the two averaged matrices as heat maps; with a path, save the image too.

        Raises:
            ImportError: without matplotlib.
        """
        size = 2.2 + 0.45 * len(self.concepts)
        figure = _figure(2 * size, size)
        titles = ("no intervention", "under do(column)")
        means = self.mean()
        top = max(float(values.max()) for values in means) or 1.0
        axes = figure.subplots(1, 2)
        images = [ax.imshow(values, vmin=0, vmax=top, cmap="viridis") for ax, values in zip(axes, means, strict=True)]
        for ax, title, values in zip(axes, titles, means, strict=True):
            ticks = range(len(self.concepts))
            # Names may hold dollar signs, which would begin a formula.
            ax.set_xticks(ticks, self.concepts, rotation=45, ha="right", parse_math=False)
            ax.set_yticks(ticks, self.concepts, parse_math=False)
            ax.set(title=title, xlabel="cause", ylabel="effect")
            if len(self.concepts) <= 12:
                for i in ticks:
                    for j in ticks:
                        color = "white" if values[i, j] < 0.6 * top else "black"
                        ax.text(j, i, f"{values[i, j]:.2g}", ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(images[0], ax=list(axes), label="size of the path, mean over layers", shrink=0.8)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def plot_layers(self, path: str | Path | None = None) -> Figure:
        """Draw `changes`: a heat map for each concept, blocks from top to bottom, a block's layers from left to right.

        With a path, save the image too.

        Raises:
            ImportError: without matplotlib.
        """
        cells = _blocks_and_kinds(_without_shared_beginning(self.layers))
        blocks, kinds = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
        # Layers that there are none of stay empty.
        tables = torch.full((len(self.concepts), len(blocks), len(kinds)), torch.nan)
        for (block, kind), change in zip(cells, self.changes, strict=True):
            tables[:, blocks.index(block), kinds.index(kind)] = change
        rows, columns = ([_shortened(n) for n in _without_shared_beginning(names)] for names in (blocks, kinds))
        label_width, label_height = (0.075 * max(map(len, names)) for names in (rows, columns))
        panel_width = max(0.22 * len(columns), 0.9)
        figure = _figure(
            1.5 + label_width + panel_width * len(self.concepts), 1.0 + label_height + 0.16 * max(len(rows), 10)
        )
        axes = figure.subplots(1, len(self.concepts), sharey=True, squeeze=False)[0]
        top = float(self.changes.max()) or 1.0
        images = [
            ax.imshow(table, vmin=0, vmax=top, cmap="viridis", aspect="auto")
            for ax, table in zip(axes, tables, strict=True)
        ]
        for ax, concept in zip(axes, self.concepts, strict=True):
            ax.set_title(concept, fontsize=9, parse_math=False)
            ax.set_xticks(range(len(columns)), columns, fontsize=8, rotation=90, parse_math=False)
            ax.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)
        figure.colorbar(images[0], ax=list(axes)).set_label("relative change under do(concept)", fontsize=9)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(f"Plots need matplotlib: {installation('plot')}") from error
    return Figure(figsize=(width, height), layout="constrained")


def _without_shared_beginning(paths: Sequence[str]) -> list[str]:
    """Paths without the components that all begin with."""
    parts = [path.split(".") for path in paths]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == parts[0][shared] for path in parts):
        shared += 1
    return [".".join(path[shared:]) for path in parts]


def _blocks_and_kinds(names: Sequence[str]) -> list[tuple[str, str]]:
    """Layers' names in two parts: a numbered block of the model, and which of its layers.

    Of the numbers in a name that one counts after which most names go on as this one does. A name without has no second
    part.
    """
    splits = [
        [(name[: found.end()], name[found.end() + 1 :]) for found in re.finditer(r"(?<![^.])\d+(?=\.)", name)]
        for name in names
    ]
    common = Counter(kind for found in splits for _, kind in found)
    return [
        max(found, key=lambda split: (common[split[1]], len(split[1])), default=(name, ""))
        for name, found in zip(names, splits, strict=True)
    ]


def _shortened(name: str) -> str:
    """The middle of a very long name is left out."""
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}...{name[-half:]}"


def causal_effects(model: nn.Module, adapter_name: str = "default") -> CausalEffects:
    """Measure how strongly each concept's coordinates act on each concept's output, layer by layer.

    The size of the whole path, ||Up_i M_ij(m) Down_j||, does not depend on how it is split between the three factors,
    as the entries of a mixing matrix would.

    Raises:
        ValueError: for an unknown adapter, or a mechanism that is not linear.

    Example:
        >>> from peft import get_peft_model
        >>> from hf_causal_context import CausalContextConfig
        >>> config = CausalContextConfig(concepts=("thick", "slant"), target_modules=["0"])
        >>> effects = causal_effects(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config))
        >>> effects.interventional.shape  # a layer, and a table of 2 x 2 concepts
        torch.Size([1, 2, 2])
        >>> effects.plot("effects.png")   # doctest: +SKIP
        >>> effects.plot_layers("layers.png")   # doctest: +SKIP
    """
    names, observational, interventional, changes = [], [], [], []
    concepts: tuple[str, ...] = ()
    for name, layer in adapted_layers(model).items():
        if adapter_name not in layer.causal_context_down:
            continue
        if adapter_name in layer.causal_context_expressive:
            raise UserValueError(
                f"Adapter {adapter_name!r} is not linear (expressive_depth > 0), so effects have no one size."
            )
        layer.weights(adapter_name)  # refuses those that are elsewhere
        concepts = layer.concepts[adapter_name].names
        names.append(name.removeprefix(PEFT_PREFIX))
        nothing, *each = torch.cat([torch.zeros(1, len(concepts)), torch.eye(len(concepts))])[:, None]
        observational.append(_path_sizes(layer, adapter_name, nothing))
        columns = [_path_sizes(layer, adapter_name, mask)[:, j] for j, mask in enumerate(each)]
        interventional.append(torch.stack(columns, dim=1))
        changes.append(_relative_changes(layer, adapter_name, nothing, each))
    if not names:
        raise UserValueError(f"The model has no causal context adapter {adapter_name!r}.")
    return CausalEffects(
        concepts, tuple(names), torch.stack(observational), torch.stack(interventional), torch.stack(changes)
    )


@torch.no_grad()
def _relative_changes(layer: CausalContextLayer, adapter_name: str, nothing: Tensor, each: Sequence[Tensor]) -> Tensor:
    """(K,) Frobenius norms of Up (M(do(k)) - M(no intervention)) Down over that of the frozen weight."""
    down, up = _weights(layer, adapter_name)
    up_gram, down_gram = up.T @ up, down @ down.T
    differences = torch.stack(
        [_mixing(layer, adapter_name, mask) - _mixing(layer, adapter_name, nothing) for mask in each]
    )
    squares = torch.einsum("ab,kbc,cd,kad->k", up_gram, differences, down_gram, differences)
    frozen = _frozen_weight(layer).double().norm()
    # Nothing to relate to where the frozen weight is zero.
    relative = squares.clamp(min=0).sqrt() * abs(layer.scaling[adapter_name]) / (frozen if frozen > 0 else 1)
    return relative.float().cpu()


def _frozen_weight(layer: CausalContextLayer) -> Tensor:
    weight = dequantize_module_weight(layer.get_base_layer())
    if type(weight).__name__ == "GGUFParameter":  # which PEFT does not know
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return dequantize_gguf_tensor(weight)
    return weight


def _weights(layer: CausalContextLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Down (R, in) and Up (out, R) of the concepts in float64, without the observational part."""
    down = cast(RepresentationLayer, layer.causal_context_down[adapter_name]).weight
    up = cast(OutputLayer, layer.causal_context_up[adapter_name]).weight
    part = layer.causal(adapter_name).observational_rank
    return down.double().flatten(1)[part:], up.double()[:, part:]


def _mixing(layer: CausalContextLayer, adapter_name: str, mask: Tensor) -> Tensor:
    """M(m) (R, R) of the concepts in float64."""
    part = layer.causal(adapter_name).observational_rank
    down, _ = _weights(layer, adapter_name)  # not all mechanisms have tensors that tell the device
    return layer.matrix(adapter_name, mask.to(down.device)).double()[part:, part:]


@torch.no_grad()
def _path_sizes(layer: CausalContextLayer, adapter_name: str, mask: Tensor) -> Tensor:
    """(K, K) Frobenius norms of Up_i M_ij Down_j, from Gram matrices of R x R instead of products of D x D."""
    K = mask.shape[1]
    down, up = _weights(layer, adapter_name)
    mixing = _blocks(_mixing(layer, adapter_name, mask), K)  # (i, j, W, W)
    up_gram = torch.stack([_blocks(up.T @ up, K)[k, k] for k in range(K)])
    down_gram = torch.stack([_blocks(down @ down.T, K)[k, k] for k in range(K)])
    squares = torch.einsum("iab,ijbc,jcd,ijad->ij", up_gram, mixing, down_gram, mixing)
    return (squares.clamp(min=0).sqrt() * layer.scaling[adapter_name]).float().cpu()


def _blocks(matrix_RR: Tensor, num_concepts: int) -> Tensor:
    """(R, R) -> (K, K, W, W): block (i, j) holds the rows of concept i and the columns of concept j."""
    width = matrix_RR.shape[0] // num_concepts
    return matrix_RR.view(num_concepts, width, num_concepts, width).transpose(1, 2)
