"""The methods that the composition benchmark compares: each trains on a study and returns how to sample a context.

Shapes: B samples, D dimensions, K concepts.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_causal_context import CausalContextConfig, ConceptSet, Context
from hf_causal_context.data.reweighting import ReweightedContext, draw_combinations, reweight
from hf_causal_context.training.observational import SHARE

from .vector_flow import VectorFlow, Velocity, noised, optimize, sample

WIDTH = 4  # of a concept: every adapter has rank K WIDTH
LEARNING_RATE = 2e-3
REWEIGHTED_SHARE = 0.5  # of a reweighted combination in the batches, relative to a real context
COIND_WEIGHT = 1.0
_OBSERVATIONAL = "obs"  # the adapter of the observational set

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
    causes: Mapping[str, frozenset[str]]  # of every concept, direct or not: the true graph
    seed: int
    steps: int
    batch_size: int
    true_ratios: Callable[[], Tensor] | None = None  # log p_j / p_obs (rows, K) at all vectors of `sets`

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.embed.weight.device

    def sample(self, velocity: Velocity, num: int, seed: int, corrections: int = 0) -> Tensor:
        """Vectors (num, D) of a model on that device."""
        dimension = self.base.out_proj.out_features
        return sample(velocity, num, seed, dimension=dimension, corrections=corrections, device=self.device)

    @cached_property
    def reweighted(self) -> list[ReweightedContext]:
        """The pairs, as rows of all training sets."""
        contexts = [str(context) for context, rows in self.sets.items() for _ in range(len(rows))]
        return reweight(self.pooled, contexts, self.concepts, self.pairs, seed=self.seed, device=self.device)

    @cached_property
    def reweighted_by_truth(self) -> list[ReweightedContext]:
        """The same by the true density ratios: what could be drawn if nothing had to be estimated."""
        assert self.true_ratios is not None
        codes = torch.cat([torch.full((len(rows),), code) for code, rows in enumerate(self.sets.values())])
        return draw_combinations(self.true_ratios(), codes, self.concepts, self.pairs, seed=self.seed)

    @property
    def pooled(self) -> Tensor:
        """All vectors of the training sets."""
        return torch.cat(list(self.sets.values()))

    def with_combinations(self, drawn: Iterable[ReweightedContext]) -> Sets:
        """`sets`, and those combinations that the data supports."""
        vectors = self.pooled
        return {**self.sets, **{each.context: vectors[each.rows] for each in drawn if not each.doubt}}


class Batches:
    """Noised vectors of random contexts; reweighted ones come half as often as real ones.

    The first batches are of the observational set, the first of `sets`, alone: as many as are given.
    """

    def __init__(self, study: Study, sets: Sets, batch_size: int | None = None, num_observational: int = 0) -> None:
        self._observational_left = num_observational
        self.generator = torch.Generator().manual_seed(study.seed)
        self.batch_size = batch_size or study.batch_size
        self._vectors = torch.cat(list(sets.values())).to(study.device)
        self._sizes = torch.tensor([len(vectors) for vectors in sets.values()])
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._masks = study.concepts.mask(list(sets)).to(study.device)
        real = (vectors is study.oracle_sets.get(context) for context, vectors in sets.items())
        self._shares = torch.tensor([1.0 if own else REWEIGHTED_SHARE for own in real])

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, D), time (B,), velocity (B, D), mask (B, K)."""
        chosen = torch.multinomial(self._shares, self.batch_size, replacement=True, generator=self.generator)
        if self._observational_left:
            self._observational_left -= 1
            chosen.zero_()
        rows = (torch.rand(self.batch_size, generator=self.generator) * self._sizes[chosen]).long()
        numbers, chosen = (self._starts[chosen] + rows).to(self._vectors.device), chosen.to(self._vectors.device)
        return *noised(self._vectors[numbers], self.generator), self._masks[chosen]


def context_adapter(study: Study, sets: Sets, *, staged: bool = True, **options: Any) -> Sampler:
    """Ours; with an observational part it begins with the observational set alone, as the trainers do."""
    torch.manual_seed(study.seed)
    config = CausalContextConfig(
        concepts=study.concepts.names, concept_rank=WIDTH, target_modules=list(VectorFlow.LINEARS), **options
    )
    model = cast(nn.Module, get_peft_model(cast(Any, copy.deepcopy(study.base)), config))
    staged = staged and options.get("observational_rank") != 0
    batches = Batches(study, sets, num_observational=int(SHARE * study.steps) if staged else 0)

    def loss() -> Tensor:
        x, time, velocity, mask = batches()
        return (model(x, time, context=mask) - velocity).square().mean()

    _optimize(study, model, loss)
    masks = {context: study.concepts.mask([context]).to(study.device) for context in study.oracle_sets}
    return lambda context, num, seed: study.sample(partial(model, context=masks[context]), num, seed)


class MultiHot(nn.Module):
    """The base and a multi-hot embedding of the concepts (K, H), added to that of the time."""

    def __init__(self, base: VectorFlow, num_concepts: int) -> None:
        super().__init__()
        self.base = base
        self.concepts = nn.Parameter(
            torch.zeros(num_concepts, base.embed.out_features, device=base.embed.weight.device)
        )

    def forward(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        shift = mask @ self.concepts
        handle = self.base.embed.register_forward_hook(lambda module, inputs, output: cast(Tensor, output) + shift)
        try:
            return self.base(x, time)
        finally:
            handle.remove()


def multi_hot_lora(study: Study, sets: Sets, coind: float = 0.0) -> Sampler:
    """One pooled LoRA and a multi-hot concept embedding.

    `coind` weighs the pairwise independence objective |v(a, b) - v(a) - v(b) + v()|^2 on random pairs of the study:
    Gaudi et al., "CoInD: Enabling Logical Compositions in Diffusion Models" (ICLR 2025).
    """
    torch.manual_seed(study.seed)
    tuned: Any = get_peft_model(cast(Any, copy.deepcopy(study.base)), lora(len(study.concepts) * WIDTH))
    model = MultiHot(tuned.base_model.model, len(study.concepts))
    model.concepts.requires_grad_()
    batches = Batches(study, sets)
    singles = [[Context(target) for target in sorted(pair.targets)] for pair in study.pairs]
    pairs = torch.stack([study.concepts.mask(pair) for pair in singles]).to(study.device)  # (pairs, 2, K)

    def loss() -> Tensor:
        x, time, velocity, mask = batches()
        loss = (model(x, time, mask) - velocity).square().mean()
        if not coind:
            return loss
        rows = len(x) // 4  # as many forward passes as the loss itself takes
        x, time = x[:rows], time[:rows]
        first, second = pairs[torch.randint(len(pairs), (rows,), generator=batches.generator)].unbind(1)
        masks = torch.cat([first + second, first, second, torch.zeros_like(first)])
        both, a, b, neither = model(x.repeat(4, 1), time.repeat(4), masks).chunk(4)
        return loss + coind * (both - a - b + neither).square().mean()

    _optimize(study, model, loss)

    def draw(context: Context, num: int, seed: int) -> Tensor:
        mask = study.concepts.mask([context]).to(study.device)
        return study.sample(lambda x, time: model(x, time, mask), num, seed)

    return draw


class SingleLoras:
    """One LoRA per set, the observational one included, each trained on as many vectors of it as other methods see."""

    def __init__(self, study: Study) -> None:
        torch.manual_seed(study.seed)
        self.sample = study.sample
        first, *others = (*study.concepts, _OBSERVATIONAL)
        self.model: Any = get_peft_model(cast(Any, copy.deepcopy(study.base)), lora(WIDTH), adapter_name=first)
        for name in others:
            self.model.add_adapter(name, lora(WIDTH))
        for name in (first, *others):
            self.model.set_adapter(name)
            context = Context() if name == _OBSERVATIONAL else Context(name)
            own = {context: study.sets[context]}
            batches = Batches(study, own, study.batch_size // len(study.sets))

            def loss(batches: Batches = batches) -> Tensor:
                x, time, velocity, _ = batches()
                return (self.model(x, time) - velocity).square().mean()

            _optimize(study, self.model, loss)

    def stacked(self, context: Context, num: int, seed: int) -> Tensor:
        """All adapters of the context at once, by `set_adapter`."""
        self.model.base_model.set_adapter(list(context.targets))
        return self.sample(self.model, num, seed)

    def stacked_minus_observational(self, context: Context, num: int, seed: int) -> Tensor:
        """a + b - obs: with n adapters of concepts the observational one is on (1 - n) times."""
        self.model.base_model.set_adapter([*context.targets, _OBSERVATIONAL])
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.scaling[_OBSERVATIONAL] = 1.0 - len(context.targets)
        samples = self.sample(self.model, num, seed)
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.scaling[_OBSERVATIONAL] = 1.0
        return samples

    def composed(
        self, context: Context, num: int, seed: int, corrections: int = 0, observational_adapter: bool = False
    ) -> Tensor:
        """v() + sum over targets of (v(target) - v()): one pass per target and one more.

        v() is the base, or the base with the adapter of the observational set.
        """

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            self.model.set_adapter(_OBSERVATIONAL)
            with nullcontext() if observational_adapter else self.model.disable_adapter():
                observational = self.model(x, time)
            total = observational
            for target in context.targets:
                self.model.set_adapter(target)
                total = total + self.model(x, time) - observational
            return total

        return self.sample(velocity, num, seed, corrections)


def lora(rank: int) -> LoraConfig:
    """A LoRA of every Linear of the base."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(VectorFlow.LINEARS))


def _optimize(study: Study, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimize(parameters, loss, study.steps, LEARNING_RATE, "adapter")
    model.eval()


_OURS: dict[str, dict[str, Any]] = {
    "independent": {},
    "independent, no part": {"observational_rank": 0},
    "independent, not staged": {"staged": False},
    **{f"independent, rank {n}, not staged": {"observational_rank": n, "staged": False} for n in (1, 4, 8, 24)},
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
    return {
        "stacked LoRAs": loras.stacked,
        "stacked LoRAs, a+b-obs": loras.stacked_minus_observational,
        "composed scores": loras.composed,
        "composed scores, Langevin": corrected,
        "composed scores, a+b-obs": partial(loras.composed, observational_adapter=True),
    }


# name of a training -> what trains it, and the samplers that come of it by the names of their results
METHODS: dict[str, Callable[[Study], dict[str, Sampler]]] = {
    "base": lambda study: {"base": lambda context, num, seed: study.sample(study.base, num, seed)},
    "single LoRAs": _single_loras,
    "multi-hot LoRA": lambda study: {"multi-hot LoRA": multi_hot_lora(study, study.sets)},
    "CoInD": lambda study: {"CoInD": multi_hot_lora(study, study.sets, coind=COIND_WEIGHT)},
    **{
        name: lambda study, name=name, options=options: {name: context_adapter(study, study.sets, **options)}
        for name, options in _OURS.items()
    },
    **{
        f"{name}, reweighted": lambda study, name=name: {
            f"{name}, reweighted": context_adapter(study, study.with_combinations(study.reweighted), **_OURS[name])
        }
        for name in ("independent", "independent, no part", "structural, anchored")
    },
    "independent, reweighted by the truth": lambda study: {
        "independent, reweighted by the truth": context_adapter(
            study, study.with_combinations(study.reweighted_by_truth)
        )
    },
    "multi-hot LoRA, reweighted": lambda study: {
        "multi-hot LoRA, reweighted": multi_hot_lora(study, study.with_combinations(study.reweighted))
    },
    **{
        f"oracle, {name}": lambda study, name=name: {
            f"oracle, {name}": context_adapter(study, study.oracle_sets, **_OURS[name])
        }
        for name in ("independent", "structural, anchored")
    },
    "oracle, multi-hot LoRA": lambda study: {"oracle, multi-hot LoRA": multi_hot_lora(study, study.oracle_sets)},
}
