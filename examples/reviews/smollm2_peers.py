"""The methods that `smollm2.py` compares and that train nothing: LoRAs merged in PEFT's ways, steering, asking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from hf_causal_context import Context

from .methods import log_losses, lora_sum, stacked, steerable
from .smollm2_methods import (
    Method,
    Study,
    adapter,
    adapter_without_part,
    asked_lora,
    base,
    oracle,
    self_composed,
    stacked_loras,
    subtracted_loras,
)

DENSITY = 0.5  # of the weights that a merge keeps
STEERING_DEPTHS, STEERING_FACTORS = (0.3, 0.5, 0.7), (1.0, 2.0, 4.0)
_SEEN, _JUDGED = 100, 20  # sentences of a vector, and of the choice of its layer and factor


def asked_base(study: Study) -> Method:
    """The instruct model's own way: the base is asked for the concepts in its system prompt."""
    return Method(study.load_base().eval(), lambda context: nullcontext(), study.world.asking)


def ties(study: Study) -> Method:
    """The LoRAs of a combination, merged after TIES (Yadav et al., 2023)."""
    return _merged(study, "ties")


def dare(study: Study) -> Method:
    """The LoRAs of a combination, merged after DARE (Yu et al., 2024)."""
    return _merged(study, "dare_linear")


def _merged(study: Study, how: str) -> Method:
    model = study.loras

    @contextmanager
    def under(context: Context) -> Iterator[None]:
        factors = stacked(context)
        if len(factors) < 2:
            with lora_sum(model, factors):
                yield
            return
        set_seed(study.seed)  # DARE drops weights at random
        model.base_model.add_weighted_adapter(
            list(factors), list(factors.values()), "merged", combination_type=how, density=DENSITY
        )
        try:
            with lora_sum(model, {"merged": 1.0}):
                yield
        finally:
            model.base_model.set_adapter(list(factors))
            model.base_model.delete_adapter("merged")

    return Method(model, under)


def steering_vectors(study: Study) -> Method:
    """Contrastive activation addition (Panickssery et al., 2024): differences of mean activations, added to a layer.

    They are those of the same sentences with and without a concept, and join at every token. Layer and factor are those
    under which other reviews of the concept are likeliest.
    """
    model = study.load_base().eval()
    layers = model.model.layers
    steered = steerable(layers)
    means = {context: _mean_activations(model, study, context) for context in study.contexts}
    prompt = study.beginning()
    chosen: dict[str, tuple[int, Tensor]] = {}
    for context in filter(None, study.contexts):
        rows = study.tokens(study.sentences[_SEEN : _SEEN + _JUDGED], context)
        texts = [[prompt[0], *row.ids[len(prompt) :].tolist()] for row in rows]
        losses: dict[tuple[int, float], float] = {}
        for number in sorted({int(depth * (len(layers) - 1)) for depth in STEERING_DEPTHS}):
            for factor in STEERING_FACTORS:
                with steered([(number, factor * (means[context] - means[Context()])[number])]):
                    losses[number, factor] = float(log_losses(model, texts, prompt[1:])[0].sum())
        number, factor = min(losses, key=losses.__getitem__)
        chosen[str(context)] = (number, factor * (means[context] - means[Context()])[number])
        print(f"  steering {context}: layer {number}, factor {factor:g}", flush=True)
    return Method(
        model,
        lambda context: steered([(chosen[k][0], strength * chosen[k][1]) for k, strength in context.strengths.items()]),
    )


@torch.no_grad()
def _mean_activations(model: Any, study: Study, context: Context) -> Tensor:
    """(layers, features) means of the layers' outputs over the tokens of completions."""
    total, count = torch.zeros(()), 0
    for row in study.tokens(study.sentences[:_SEEN], context):
        ids = torch.as_tensor(row.ids, dtype=torch.long, device=model.device)[None]
        learned = torch.as_tensor(row.labels >= 0)
        hidden = torch.stack(model(ids, output_hidden_states=True).hidden_states[1:])[:, 0, learned]
        total, count = total + hidden.sum(1), count + int(learned.sum())
    return total / count


METHODS: Mapping[str, Callable[[Study], Method]] = {
    "base": base,
    "adapter": adapter,
    "adapter, self-composed pairs": self_composed,
    "adapter, no observational part": adapter_without_part,
    "stacked LoRAs": stacked_loras,
    "a+b-obs": subtracted_loras,
    "LoRAs merged by TIES": ties,
    "LoRAs merged by DARE": dare,
    "a LoRA that is asked": asked_lora,
    "the base, asked": asked_base,
    "steering vectors": steering_vectors,
    "oracle": oracle,
}
