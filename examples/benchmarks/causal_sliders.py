"""A peer of the composition benchmark: one LoRA per concept, composed in the order of the causal graph.

Written from the abstract of "CausalSliders: Graph-Guided LoRA Interventions for Causally Consistent Image Editing"
(ICLR 2026, https://iclr.cc/virtual/2026/10020428), the only description that we found; nobody's code was read. From it:

- every factor has a LoRA of its own, and an edit is an effect in the space of the parameters;
- a loss for minimality (what is not the target must not drift), and one for conditional independence (factors must not
  interfere);
- a graph of the factors, and a gated composition in causal order that does not commute and enforces mediation.

What it does not say, and we chose:

- A LoRA adds Up Down W to the weight W of a Linear: it reads what the layer would write. Interventions then follow each
  other, causes first, W -> (1 + g Up Down) W, and each sees what its causes have changed, and can correct it. The gates
  g are the strengths. (A harder gate, which takes from a cause all that it writes where its effect writes, was worse
  on the unseen pairs of the dependent world, seed 0: 0.131, a plain sum 0.106.)
- Minimality: the mean square of what a LoRA changes, |v(a) - v()|^2.
- Independence: |v(a, b) - v(a) - v(b) + v()|^2 for pairs of which neither causes the other.
- All LoRAs train at once, in as many updates on the same batches as the other methods; both losses are on an eighth of
  the rows and on random pairs without a path. Their weights were not tuned.

It is told the true graph. `after_observational` puts the LoRAs on a base that was first adapted to the observational
set, in a fifth of the updates: the abstract knows no data but the base's own.

Shapes: B samples, K concepts, R rank.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn

from hf_causal_context import Context
from hf_causal_context.training.observational import SHARE

from .composition_methods import LEARNING_RATE, WIDTH, Batches, Sampler, Study, lora
from .vector_flow import VectorFlow, optimize

MINIMALITY_WEIGHT = 0.01
INDEPENDENCE_WEIGHT = 0.1


class SliderLinear(nn.Module):
    """A frozen Linear and a LoRA per concept; the mask (B, K) of a batch says which are on."""

    mask: Tensor

    def __init__(self, base: nn.Linear, order: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self.order = order  # of concepts, causes first
        shape = (len(order), WIDTH, base.out_features)
        self.down = nn.Parameter(torch.empty(shape, device=base.weight.device))
        bound = base.out_features**-0.5
        nn.init.uniform_(self.down, -bound, bound)
        self.up = nn.Parameter(torch.zeros(shape, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        alone = int(self.mask.count_nonzero(dim=1).max()) < 2  # so that nothing follows anything: faster at once
        on = self.mask.any(dim=0).tolist()
        for part in [slice(None)] if alone else [slice(k, k + 1) for k in self.order if on[k]]:
            read = (y @ self.down[part].flatten(0, 1).T).unflatten(1, (-1, WIDTH)) * self.mask[:, part, None]
            y = y + read.flatten(1) @ self.up[part].flatten(0, 1)
        return y


class Sliders(nn.Module):
    """A base whose Linears have LoRAs of all concepts."""

    def __init__(self, base: VectorFlow, order: Sequence[int]) -> None:
        super().__init__()
        self.base = copy.deepcopy(base)
        self.layers: list[SliderLinear] = []
        for name, module in list(self.base.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                self.layers.append(SliderLinear(module, order))
                setattr(self.base.get_submodule(parent), child, self.layers[-1])

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            layer.mask = mask
        return self.base(x, time)


def causal_sliders(
    study: Study,
    *,
    minimality: float = MINIMALITY_WEIGHT,
    independence: float = INDEPENDENCE_WEIGHT,
    after_observational: bool = False,
) -> Sampler:
    """Train the LoRAs of all concepts."""
    torch.manual_seed(study.seed)
    first = int(SHARE * study.steps) if after_observational else 0
    order = sorted(range(len(study.concepts)), key=lambda k: len(study.causes[study.concepts.names[k]]))
    model = Sliders(_adapted(study, first) if first else study.base, order)
    batches = Batches(study, study.sets)
    free = [
        (i, j)
        for (i, a), (j, b) in combinations(enumerate(study.concepts), 2)
        if a not in study.causes[b] and b not in study.causes[a]
    ]
    pairs = torch.eye(len(study.concepts))[torch.tensor(free)]  # one-hot (pairs, 2, K)

    def loss() -> Tensor:
        x, time, velocity, mask = batches()
        loss = (model(x, time, mask) - velocity).square().mean()
        rows = len(x) // 8  # half as many forward passes as the loss itself takes
        x, time = x[:rows], time[:rows]
        chosen = torch.randint(len(pairs), (rows,), generator=batches.generator)
        one, other = pairs[chosen].to(x.device).unbind(1)
        masks = torch.cat([one, other, torch.zeros_like(one)])
        a, b, neither = model(x.repeat(3, 1), time.repeat(3), masks).chunk(3)
        both = model(x, time, one + other)
        drift = ((a - neither).square() + (b - neither).square()).mean() / 2
        return loss + minimality * drift + independence * (both - a - b + neither).square().mean()

    parameters = [parameter for layer in model.layers for parameter in (layer.down, layer.up)]
    optimize(parameters, loss, study.steps - first, LEARNING_RATE, "sliders")
    model.eval().requires_grad_(False)

    def draw(context: Context, num: int, seed: int) -> Tensor:
        return study.sample(partial(model, mask=study.concepts.mask([context]).to(study.device)), num, seed)

    return draw


def _adapted(study: Study, steps: int) -> VectorFlow:
    """The base with a LoRA of the observational set merged into it."""
    model: Any = get_peft_model(cast(Any, copy.deepcopy(study.base)), lora(WIDTH * len(study.concepts)))
    batches = Batches(study, {Context(): study.sets[Context()]})

    def loss() -> Tensor:
        x, time, velocity, _ = batches()
        return (model(x, time) - velocity).square().mean()

    optimize([p for p in model.parameters() if p.requires_grad], loss, steps, LEARNING_RATE, "observational")
    return model.merge_and_unload().requires_grad_(False)


SLIDERS: dict[str, Callable[[Study], dict[str, Sampler]]] = {
    "CausalSliders": lambda study: {"CausalSliders": causal_sliders(study)},
    "CausalSliders, observational first": lambda study: {
        "CausalSliders, observational first": causal_sliders(study, after_observational=True)
    },
}
