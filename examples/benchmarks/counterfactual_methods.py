"""What the counterfactual benchmark compares: each method returns what images would have been in contexts.

An edit takes images (N, 1, 32, 32) in [0, 1] and contexts, and returns (contexts, N, 1, 32, 32). All that use a base
use the same one, and all but the LoRAs and the autoencoder the same adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from hf_causal_context import Context, intervene
from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.inference.counterfactuals import Sampler, counterfactuals
from hf_causal_context.models import ContextAutoencoder

from .image_composition_methods import Study, train_loras

SDEDIT_LEVEL = 0.6  # of the noise, at which SDEdit starts: of 0.4, 0.6 and 0.8 the one with the least error on digits

Edit = Callable[[Tensor, Sequence[Context]], Tensor]


def ours(base: DiffusionBase, steps: int) -> Edit:
    """`counterfactual`, with one abduction for all contexts."""

    def edit(images: Tensor, contexts: Sequence[Context]) -> Tensor:
        found = counterfactuals(
            base,
            images,
            contexts,
            Context(),
            strengths=[1.0],
            mask=None,
            prompt=None,
            class_label=None,
            num_inference_steps=steps,
            calibrated=False,
        )
        return torch.stack([each.images[0] for each in found])

    return edit


def stacked_loras(base: DiffusionBase, steps: int, study: Study, updates: int) -> Edit:
    """The LoRAs of a context's concepts, from the noise maps that ours start from."""
    sampler = Sampler(base, steps, None, None)
    denoiser: Any = base.denoiser
    deltas = _lora_deltas(study, updates)

    @torch.no_grad()
    def edit(images: Tensor, contexts: Sequence[Context]) -> Tensor:
        found = sampler.backward(2 * images - 1, Context())
        weights = {name: value.clone() for name, value in denoiser.state_dict().items()}
        made = []
        for context in contexts:
            for name, delta in [item for concept in context.targets for item in deltas[concept].items()]:
                denoiser.get_submodule(name).base_layer.weight += delta
            made.append(base.decode_images(sampler.forward(found, [Context()])))
            denoiser.load_state_dict(weights)
        return torch.stack(made)

    return edit


def ddim_inversion(base: DiffusionBase, steps: int) -> Edit:
    """Noise by the plain inversion of DDIM, which predicts each step's noise before the step."""

    @torch.no_grad()
    def edit(images: Tensor, contexts: Sequence[Context]) -> Tensor:
        sampler = Sampler(base, steps, None, None)
        x = 2 * images - 1
        with intervene(base.pipe, Context()):
            for step in reversed(sampler.grid(x)):
                noise = (x - step.alpha * sampler.predict_clean(x, step, {})) / step.sigma
                x = step.alpha * (x - step.next_sigma * noise) / step.next_alpha + step.sigma * noise
        return torch.stack([_drawn(base, sampler, x, context, 1.0) for context in contexts])

    return edit


def sdedit(base: DiffusionBase, steps: int) -> Edit:
    """Some noise, and DDIM from there."""

    @torch.no_grad()
    def edit(images: Tensor, contexts: Sequence[Context]) -> Tensor:
        sampler = Sampler(base, steps, None, None)
        first = next(step for step in sampler.grid(images) if step.sigma <= SDEDIT_LEVEL)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        x = first.alpha * (2 * images - 1) + first.sigma * noise
        return torch.stack([_drawn(base, sampler, x, context, SDEDIT_LEVEL) for context in contexts])

    return edit


def autoencoder(model: ContextAutoencoder) -> Edit:
    """The paper's own model."""

    def edit(images: Tensor, contexts: Sequence[Context]) -> Tensor:
        return torch.stack([model.counterfactual(images, (), context) for context in contexts])

    return edit


def no_edit(images: Tensor, contexts: Sequence[Context]) -> Tensor:
    """The images."""
    return images.expand(len(contexts), *images.shape)


def _drawn(base: DiffusionBase, sampler: Sampler, x: Tensor, context: Context, level: float) -> Tensor:
    """Images by DDIM's deterministic steps from that level of noise on."""
    with intervene(base.pipe, context):
        for step in sampler.grid(x):
            if step.sigma <= level:
                clean = sampler.predict_clean(x, step, {})
                x = step.next_alpha * clean + step.next_sigma * (x - step.alpha * clean) / step.sigma
    return base.decode_images(x)


def _lora_deltas(study: Study, updates: int) -> dict[str, dict[str, Tensor]]:
    """Return what each concept's LoRA adds to every weight."""
    folder = train_loras(study, updates, study.world.concepts)
    deltas = {}
    for concept in study.world.concepts:
        model: Any = PeftModel.from_pretrained(cast(Any, study.load_base().denoiser), folder / concept)
        layers = dict(model.get_base_model().named_modules())
        deltas[concept] = {
            name: layer.get_delta_weight("default").detach()
            for name, layer in layers.items()
            if hasattr(layer, "get_delta_weight")
        }
    return deltas
