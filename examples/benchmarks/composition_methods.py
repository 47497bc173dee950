"""The methods that the composition benchmark compares: each trains on a study and returns how to sample a context.

Shapes: B samples, D dimensions, K concepts.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from vector_flow import VectorFlow, noised, optimise, sample

from hf_causal_context import CausalContextConfig, ConceptSet, Context
from hf_causal_context.data.reweighting import ReweightedContext, reweight

WIDTH = 4  # of a concept: every adapter has rank K WIDTH
LEARNING_RATE = 2e-3
REWEIGHTED_SHARE = 0.5  # of a reweighted combination in the batches, relative to a real context
COIND_WEIGHT = 1.0

Sets = Mapping[Context, Tensor]
Sampler = Callable[[Context, int, int], Tensor]  # context, number, seed -> vectors (number, D)


@dataclass
class Study:
    """What all methods share: the base, vectors (N, D) of every training context, and the size of a training."""

    base: VectorFlow
    concepts: ConceptSet
    sets: Sets
    oracle_sets: Sets  # with the combinations that are held out from the others
    pairs: tuple[Context, ...]
    seed: int
    steps: int
    batch_size: int

    @cached_property
    def reweighted(self) -> list[ReweightedContext]:
        """The pairs, as rows of all training sets."""
        contexts = [str(context) for context, rows in self.sets.items() for _ in range(len(rows))]
        return reweight(self.pooled, contexts, self.concepts, self.pairs, seed=self.seed)

    @property
    def pooled(self) -> Tensor:
        """All vectors of the training sets."""
        return torch.cat(list(self.sets.values()))

    @cached_property
    def reweighted_sets(self) -> Sets:
        """`sets`, and those of the pairs that the data supports."""
        vectors = self.pooled
        return {**self.sets, **{drawn.context: vectors[drawn.rows] for drawn in self.reweighted if not drawn.doubt}}


class Batches:
    """Noised vectors of random contexts; reweighted ones come half as often as real ones."""

    def __init__(self, study: Study, sets: Sets, batch_size: int | None = None) -> None:
        self.generator = torch.Generator().manual_seed(study.seed)
        self.batch_size = batch_size or study.batch_size
        self._vectors = torch.cat(list(sets.values()))
        self._sizes = torch.tensor([len(vectors) for vectors in sets.values()])
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._masks = study.concepts.mask(list(sets))
        real = (vectors is study.oracle_sets.get(context) for context, vectors in sets.items())
        self._shares = torch.tensor([1.0 if own else REWEIGHTED_SHARE for own in real])

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, D), time (B,), velocity (B, D), mask (B, K)."""
        chosen = torch.multinomial(self._shares, self.batch_size, replacement=True, generator=self.generator)
        rows = (torch.rand(self.batch_size, generator=self.generator) * self._sizes[chosen]).long()
        return *noised(self._vectors[self._starts[chosen] + rows], self.generator), self._masks[chosen]


def context_adapter(study: Study, sets: Sets, **options: Any) -> Sampler:
    """Ours."""
    torch.manual_seed(study.seed)
    config = CausalContextConfig(
        concepts=study.concepts.names, concept_rank=WIDTH, target_modules=list(VectorFlow.LINEARS), **options
    )
    model = cast(nn.Module, get_peft_model(cast(Any, copy.deepcopy(study.base)), config))
    batches = Batches(study, sets)

    def loss() -> Tensor:
        x, time, velocity, mask = batches()
        return (model(x, time, context=mask) - velocity).square().mean()

    _optimise(study, model, loss)
    return lambda context, num, seed: sample(partial(model, context=study.concepts.mask([context])), num, seed)


class MultiHot(nn.Module):
    """The base and a multi-hot embedding of the concepts (K, H), added to that of the time."""

    def __init__(self, base: VectorFlow, num_concepts: int) -> None:
        super().__init__()
        self.base = base
        self.concepts = nn.Parameter(torch.zeros(num_concepts, base.embed.out_features))

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        shift = mask @ self.concepts
        handle = self.base.embed.register_forward_hook(lambda module, inputs, output: cast(Tensor, output) + shift)
        try:
            return self.base(x, time)
        finally:
            handle.remove()


def multi_hot_lora(study: Study, sets: Sets, coind: float = 0.0) -> Sampler:
    """One pooled LoRA and a multi-hot concept embedding.

    `coind` weighs the pairwise independence objective |v(a, b) - v(a) - v(b) + v()|^2 on random pairs: Gaudi et al.,
    "CoInD: Enabling Logical Compositions in Diffusion Models" (ICLR 2025).
    """
    torch.manual_seed(study.seed)
    lora: Any = get_peft_model(cast(Any, copy.deepcopy(study.base)), _lora(len(study.concepts) * WIDTH))
    model = MultiHot(lora.base_model.model, len(study.concepts))
    model.concepts.requires_grad_()
    batches = Batches(study, sets)

    def loss() -> Tensor:
        x, time, velocity, mask = batches()
        loss = (model(x, time, mask) - velocity).square().mean()
        if not coind:
            return loss
        rows = len(x) // 4  # as many forward passes as the loss itself takes
        x, time = x[:rows], time[:rows]
        pair = torch.rand(rows, len(study.concepts), generator=batches.generator).topk(2).indices
        first, second = torch.nn.functional.one_hot(pair, len(study.concepts)).float().unbind(1)
        masks = torch.cat([first + second, first, second, torch.zeros_like(first)])
        both, a, b, neither = model(x.repeat(4, 1), time.repeat(4), masks).chunk(4)
        return loss + coind * (both - a - b + neither).square().mean()

    _optimise(study, model, loss)

    def draw(context: Context, num: int, seed: int) -> Tensor:
        mask = study.concepts.mask([context])
        return sample(lambda x, time: model(x, time, mask), num, seed)

    return draw


class SingleLoras:
    """One LoRA per concept, each trained on its own set, with as many vectors of it as the other methods see."""

    def __init__(self, study: Study) -> None:
        torch.manual_seed(study.seed)
        first, *others = study.concepts
        self.model: Any = get_peft_model(cast(Any, copy.deepcopy(study.base)), _lora(WIDTH), adapter_name=first)
        for concept in others:
            self.model.add_adapter(concept, _lora(WIDTH))
        for concept in study.concepts:
            self.model.set_adapter(concept)
            own = {Context(concept): study.sets[Context(concept)]}
            batches = Batches(study, own, study.batch_size // len(study.sets))

            def loss(batches: Batches = batches) -> Tensor:
                x, time, velocity, _ = batches()
                return (self.model(x, time) - velocity).square().mean()

            _optimise(study, self.model, loss)

    def stacked(self, context: Context, num: int, seed: int) -> Tensor:
        """All adapters of the context at once, by `set_adapter`."""
        self.model.base_model.set_adapter(list(context.targets))
        return sample(self.model, num, seed)

    def composed(self, context: Context, num: int, seed: int, corrections: int = 0) -> Tensor:
        """v() + sum over targets of (v(target) - v()): one pass per target and one more."""

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            with self.model.disable_adapter():
                observational = self.model(x, time)
            total = observational
            for target in context.targets:
                self.model.set_adapter(target)
                total = total + self.model(x, time) - observational
            return total

        return sample(velocity, num, seed, corrections=corrections)


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(VectorFlow.LINEARS))


def _optimise(study: Study, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimise(parameters, loss, study.steps, LEARNING_RATE, "adapter")
    model.eval()


_OURS: dict[str, dict[str, Any]] = {
    "independent": {},
    "reduced": {"mechanism": "reduced"},
    "reduced, anchored": {"mechanism": "reduced", "anchored": True},
    "reduced, anchored, imperfect": {"mechanism": "reduced", "anchored": True, "perfect_interventions": False},
    "structural": {"mechanism": "structural"},
    "structural, anchored": {"mechanism": "structural", "anchored": True},
    "structural, anchored, imperfect": {"mechanism": "structural", "anchored": True, "perfect_interventions": False},
}


def _single_loras(study: Study) -> dict[str, Sampler]:
    loras = SingleLoras(study)
    corrected = partial(loras.composed, corrections=1)
    return {"stacked LoRAs": loras.stacked, "composed scores": loras.composed, "composed scores, Langevin": corrected}


# name of a training -> what trains it, and the samplers that come of it by the names of their results
METHODS: dict[str, Callable[[Study], dict[str, Sampler]]] = {
    "base": lambda study: {"base": lambda context, num, seed: sample(study.base, num, seed)},
    "single LoRAs": _single_loras,
    "multi-hot LoRA": lambda study: {"multi-hot LoRA": multi_hot_lora(study, study.sets)},
    "CoInD": lambda study: {"CoInD": multi_hot_lora(study, study.sets, coind=COIND_WEIGHT)},
    **{
        name: lambda study, name=name, options=options: {name: context_adapter(study, study.sets, **options)}
        for name, options in _OURS.items()
    },
    **{
        f"{name}, reweighted": lambda study, name=name: {
            f"{name}, reweighted": context_adapter(study, study.reweighted_sets, **_OURS[name])
        }
        for name in ("independent", "structural, anchored")
    },
    "multi-hot LoRA, reweighted": lambda study: {
        "multi-hot LoRA, reweighted": multi_hot_lora(study, study.reweighted_sets)
    },
    **{
        f"oracle, {name}": lambda study, name=name: {
            f"oracle, {name}": context_adapter(study, study.oracle_sets, **_OURS[name])
        }
        for name in ("independent", "structural, anchored")
    },
    "oracle, multi-hot LoRA": lambda study: {"oracle, multi-hot LoRA": multi_hot_lora(study, study.oracle_sets)},
}
