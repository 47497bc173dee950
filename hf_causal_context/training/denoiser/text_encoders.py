"""Text encoders that are trained with their denoiser: one adapter with a part on each.

Their captions are encoded anew in every step, each under the context of its row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Self, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ...adapter.baking import adapter_config
from ...adapter.intervene import intervene
from ...adapter.lookup import adapted_layers
from ...bases.diffusion_base import DiffusionBase
from ...errors import UserValueError
from ...layers import RepresentationLayer
from ..loop.objective import Objective
from .objectives import Batch


class AdaptedPipeline(nn.Module):
    """A denoiser and the text encoders of its pipeline, each with its part of one adapter.

    It is called with an objective, so that all of a step happens inside of one model, as several processes need it.

    Args:
        base: the pipeline.
        denoiser: its denoiser with an adapter.
        attach: text encoder, paths of modules to leave out -> it with an adapter.
    """

    def __init__(
        self, base: DiffusionBase, denoiser: PeftModel, attach: Callable[[nn.Module, list[str] | None], PeftModel]
    ) -> None:
        super().__init__()
        self._base, self.denoiser = base, denoiser
        self._encoders = {name: attach(encoder, None) for name, encoder in base.text_encoders.items()}
        self._leave_out_unused(attach)
        for name, encoder in self._encoders.items():
            self.add_module(name, encoder)
        self.eval()

    def forward(self, objective: Objective, batch: Batch) -> Tensor:
        """Losses (B,) of a batch whose captions are not encoded."""
        conditions = self._encode(batch.captions, batch.context)
        return objective(self.denoiser, replace(batch, conditions=conditions))

    def train(self, mode: bool = True) -> Self:
        """Set the mode; of encoders only what checkpoints gradients and the adapter's dropout see it."""
        super().train(mode)
        for encoder in self._encoders.values():
            encoder.eval()
            for module in encoder.modules():
                if isinstance(module, GradientCheckpointingLayer | RepresentationLayer):
                    module.training = mode
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Let the encoders compute activations again in backward, instead of keeping them."""
        for encoder in self._encoders.values():
            model = cast(PreTrainedModel, encoder.get_base_model())
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _encode(self, captions: list[str], context: Tensor) -> dict[str, Tensor]:
        if len(captions) > 1 and not self._base.encodes_together:
            each = [self._encode([caption], row) for caption, row in zip(captions, context.unsqueeze(1), strict=True)]
            return self._base.join_conditions([{name: values[0] for name, values in one.items()} for one in each])
        with ExitStack() as stack:
            for encoder in self._encoders.values():
                stack.enter_context(intervene(encoder, context))
            return self._base.encode_captions_with_gradients(captions)

    def _leave_out_unused(self, attach: Callable[[nn.Module, list[str] | None], PeftModel]) -> None:
        """Adapt no modules whose output does not reach the denoiser, nor encoders that a plain caption does not need.

        Many pipelines take what an inner layer puts out, and several processes wait for the gradients of all.
        """
        num_concepts = len(adapter_config(self._base.denoiser).concepts)
        context = torch.ones(1, num_concepts, device=next(self.denoiser.parameters()).device)
        reached = [values.float().sum() for values in self._encode([""], context).values() if values.requires_grad]
        if reached:
            torch.stack(reached).sum().backward()
        attached, self._encoders = self._encoders, {}
        for name, encoder in attached.items():
            layers = {path: cast(nn.Module, m) for path, m in adapted_layers(encoder.get_base_model()).items()}
            unused = [path for path, layer in layers.items() if all(p.grad is None for p in layer.parameters())]
            encoder.zero_grad()
            if not unused:
                self._encoders[name] = encoder
                continue
            plain = cast(nn.Module, encoder.unload())
            if len(unused) < len(layers):
                self._encoders[name] = attach(plain, unused)
        if not self._encoders:
            raise UserValueError(
                f"--train_text_encoder: what it would adapt in the text encoders of {type(self._base.pipe).__name__} "
                "has no effect on what the denoiser is given. Leave it out."
            )


def with_encoders(objective: Objective) -> Objective:
    """Return the objective of an `AdaptedPipeline` whose denoiser has this one."""
    return lambda model, batch: model(objective, batch)
