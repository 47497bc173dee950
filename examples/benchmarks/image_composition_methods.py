"""What the benchmark of images compares: each method trains on a base and gives images of the world's contexts.

A LoRA has what a concept of the adapter has: rank, number of rows of its set, updates, rate and schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from hf_causal_context import Context
from hf_causal_context._files import complete_or_absent
from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data import InterventionalData, from_dataset
from hf_causal_context.inference.sampling import generate
from hf_causal_context.quickstart import drawn_data, training_arguments
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train

from .digit_peers import BENCHMARK, NUM_INFERENCE_STEPS, train_lora
from .image_worlds import World

OBSERVATIONAL = "observational"  # name of the LoRA that is trained on the observational set
FEW = 30  # images of each combination
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_BATCH_SIZE = 512 if DEVICE == "cuda" else 64  # of sampling

Images = dict[Context, Tensor]  # (N, 1, 32, 32) in [0, 1] of every context


@dataclasses.dataclass
class Study:
    """A world, a base, and the size of a training."""

    world: World
    base_dir: Path
    folder: Path  # of what is trained
    rows_per_context: int
    num_samples: int
    seed: int

    @cached_property
    def data(self) -> InterventionalData:
        """The observational and the single interventional sets."""
        return self._data(self.world.trained)

    @cached_property
    def oracle_data(self) -> InterventionalData:
        """With sets of the combinations."""
        return self._data(self.world.seen_by_oracle)

    @cached_property
    def few_data(self) -> InterventionalData:
        """The oracle's, with only a few images of each combination."""
        rows: Any = self.oracle_data.rows
        trained = np.isin(rows["context"][:], [str(context) for context in self.world.trained])
        kept = trained | (np.arange(len(rows)) % self.rows_per_context < FEW)
        return from_dataset(
            rows.select(np.flatnonzero(kept)),
            concepts=self.world.concepts,
            training_contexts=self.world.seen_by_oracle,
        )

    @cached_property
    def paired_data(self) -> InterventionalData:
        """The sets of `data`, but of the same samples in every context."""
        same = dataclasses.replace(
            self.world, draw=lambda n, context, seed: self.world.draw(n, context, 100 * self.seed)
        )
        data: Any = dataclasses.replace(self, world=same).data
        names = [str(number % self.rows_per_context) for number in range(len(data.rows))]
        return dataclasses.replace(data, rows=data.rows.add_column("pair", names))

    def _data(self, contexts: tuple[Context, ...]) -> InterventionalData:
        return drawn_data(
            self.world.draw, self.world.concepts, contexts, self.rows_per_context, self.seed, training_contexts=contexts
        )

    def settings(self, name: str, steps: int) -> TrainingArguments:
        """Those of the digits, for as many updates, with an observational part."""
        settings = training_arguments(self.folder / f"{name.replace(',', '').replace(' ', '-')}-{steps}", self.seed)
        return dataclasses.replace(
            settings,
            **BENCHMARK
            | {
                "pretrained_model_name_or_path": str(self.base_dir),
                "observational_rank": None,
                "max_train_steps": steps,
                "reweighted_contexts": [],
            },
        )

    def load_base(self) -> DiffusionBase:
        """A fresh copy of the base on the device."""
        base = load_base(str(self.base_dir))
        base.denoiser.to(DEVICE)
        return base

    def sample(self, base: DiffusionBase, contexts: tuple[Context, ...]) -> Images:
        """Images from the same noise in every context."""
        images = generate(
            base,
            contexts,
            seeds=range(self.num_samples),
            num_inference_steps=NUM_INFERENCE_STEPS,
            batch_size=_BATCH_SIZE,
        )
        return dict(zip(contexts, images, strict=True))


def floor(study: Study, steps: int) -> Images:
    """As many real images of the kind that methods train on."""
    return {context: study.world.floor(context, study.num_samples) for context in study.world.contexts}


def bare_base(study: Study, steps: int) -> Images:
    """The base, whatever the context."""
    return dict.fromkeys(study.world.contexts, study.sample(study.load_base(), (Context(),))[Context()])


def adapter(study: Study, steps: int, name: str, data: str = "data", **options: Any) -> Images:
    """Ours."""
    base = study.load_base()
    settings = dataclasses.replace(study.settings(name, steps), **options)
    train(settings, base, getattr(study, data))
    return study.sample(base, study.world.contexts)


def train_loras(study: Study, steps: int, names: tuple[str, ...]) -> Path:
    """Train one LoRA per name on the set of that name, unless it is there already; return the folder of all."""
    settings = study.settings("LoRAs", steps)
    folder = Path(settings.output_dir)
    for name in names:
        if (folder / name).exists():
            continue
        torch.manual_seed(1000 * study.seed + (*study.world.concepts, OBSERVATIONAL).index(name))
        base = study.load_base()
        config = LoraConfig(
            r=settings.concept_rank, lora_alpha=settings.concept_rank, target_modules=settings.target_modules
        )
        model: Any = get_peft_model(cast(Any, base.denoiser), config)
        context = "" if name == OBSERVATIONAL else name
        own = study.data.rows.with_format("numpy").filter(lambda c, own=context: c == own, input_columns="context")
        images = torch.from_numpy(cast(Any, own)["image"][:])[:, None].float() / 127.5 - 1
        batch_size = settings.train_batch_size // len(study.world.trained)  # as many as the adapter sees
        train_lora(model.train(), base.noise_scheduler(), images, settings, "default", batch_size)
        with complete_or_absent(folder / name) as unfinished:
            model.save_pretrained(unfinished)
    return folder


def stacked_loras(study: Study, steps: int, subtract: bool) -> Images:
    """The LoRAs of a context's concepts at once, at its strengths; `subtract`: less the observational one of each.

    In the observational context the latter is the observational LoRA itself, the former the base.
    """
    concepts = study.world.concepts
    names = (*concepts, OBSERVATIONAL) if subtract else concepts
    folder = train_loras(study, steps, names)
    base = study.load_base()
    model: Any = PeftModel.from_pretrained(cast(Any, base.denoiser), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    model.eval()
    images = {}
    for context in study.world.contexts:
        scales = lora_scales(context, subtract)
        model.base_model.set_adapter(list(scales) or [names[0]])
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for name in scales:
                    layer.set_scale(name, scales[name])
        if scales:
            images[context] = _sample_lora(study, base)
        else:
            with model.disable_adapter():
                images[context] = _sample_lora(study, base)
    return images


def lora_scales(context: Context, subtract: bool) -> dict[str, float]:
    """The scale of each LoRA in a context; `subtract`: obs + sum of strengths x (concept - obs)."""
    scales = context.strengths
    return scales | {OBSERVATIONAL: 1.0 - sum(scales.values())} if subtract else scales


def _sample_lora(study: Study, base: DiffusionBase) -> Tensor:
    return study.sample(base, (Context(),))[Context()]


Method = Callable[[Study, int], Images]

_OURS: dict[str, dict[str, Any]] = {
    "singles only": {},
    "reweighted pairs": {"reweighted_contexts": ["pairs"]},
    "few combinations": {"data": "few_data"},
    "oracle": {"data": "oracle_data"},
}
_WITHOUT = ", no observational part"
UNTRAINED: dict[str, Method] = {"floor": floor, "base": bare_base}
TRAINED: dict[str, Method] = {
    **{name: partial(adapter, name=name, **options) for name, options in _OURS.items()},
    **{
        name + _WITHOUT: partial(adapter, name=name + _WITHOUT, observational_rank=0, **options)
        for name, options in _OURS.items()
    },
    "stacked LoRAs": partial(stacked_loras, subtract=False),
    "a+b-obs": partial(stacked_loras, subtract=True),
}
