"""The settings of an autoencoder's training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...data.arguments import DataArguments, argument, refuse_useless
from ...errors import UserValueError
from ..optimization_arguments import LR_SCHEDULERS, OptimizationArguments

MODES = ("end-to-end", "frozen", "fine-tune")
ARCHITECTURES = ("LightweightVAE", "HierarchicalVAE")


@dataclass
class AutoencoderArguments(OptimizationArguments, DataArguments):
    """Settings of a `ContextAutoencoder`'s run, by default those of the paper's experiments on 64 x 64 images.

    `hf-causal-context train-autoencoder --help` prints them with their meaning.

    Raises:
        ValueError: for a number out of range, or options that contradict each other.
    """

    architecture: str = argument(
        ARCHITECTURES[0],
        "LightweightVAE: an encoder, the context module, a decoder. HierarchicalVAE: the context module is the top "
        "latent, and finer latents depend on it.",
    )
    resolution: int | None = argument(
        None,
        "Side of the images in pixels: 28 or a multiple of 16; of a HierarchicalVAE a multiple of 8. By default the "
        "base's, or 64.",
    )
    channels: int | None = argument(None, "1 for gray images, 3 for RGB; by default the base's, or 3.")
    noise_width: int = argument(32, "Exogenous coordinates of each concept.")
    concept_width: int = argument(8, "Width of each concept.")
    depth: int = argument(2, "Widths from noise_width to concept_width: depth - 1 expressive layers.")
    published: bool = argument(False, "Compute exactly what the published experiments did.")
    without_context_module: bool = argument(False, "Ablation: an ordinary VAE of the same size.")
    ignore_contexts: bool = argument(False, "Ablation: every image counts as observational.")

    mode: str = argument("end-to-end", "What is trained: " + ", ".join(MODES) + ".")
    base: str | None = argument(None, "Autoencoder to start from, for frozen and fine-tune: a folder or a Hub id.")
    reconstruction: str = argument("bce", "Likelihood of pixels: bce or gaussian (standard deviation 0.1).")
    beta: float = argument(1.0, "Weight of the KL divergence.")
    group_penalty: float = argument(0.0, "Weight of the causal weights' group norm, one group for a pair of concepts.")
    l2_penalty: float = argument(0.0, "Weight of the causal weights' squares.")
    mean_penalty: float | None = argument(
        None,
        "Weight, times beta, of half the squared mean of the coordinates in each context, which should be 0: keeps "
        "what an intervention changes in its own concept. By default 25, and 0 with --published and in ablations. "
        "Less, or no beta above 1, where several interventions change the same attribute.",
    )
    validation_fraction: float = argument(0.3, "Share of the rows that is kept for validation.")
    early_stopping_patience: int | None = argument(None, "Validations without a better loss after which to stop.")
    early_stopping_min_delta: float = argument(1e-4, "What counts as a better loss, in nats per image.")
    num_validation_images: int = argument(8, "Images per row of a grid; 0 for no grids.")

    train_batch_size: int = argument(512, "Images per step and process.")
    learning_rate: float = argument(1e-3, "Peak learning rate.")
    lr_scheduler: str = argument("cosine_with_min_lr", "One of: " + ", ".join(LR_SCHEDULERS) + ".")
    lr_warmup_steps: int = argument(200, "Optimizer steps of warm-up.")
    adam_weight_decay: float = argument(0.0, "AdamW.")
    max_grad_norm: float = argument(math.inf, "Gradients are clipped to this norm.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean_penalty is None:
            plain = self.published or self.without_context_module or self.ignore_contexts
            self.mean_penalty = 0.0 if plain else 25.0
        if self.base is None:
            self.resolution = 64 if self.resolution is None else self.resolution
            self.channels = 3 if self.channels is None else self.channels
        if self.channels not in (None, 1, 3):
            raise UserValueError(f"--channels={self.channels} must be 1, for gray images, or 3, for RGB.")
        if self.base is not None and self.architecture != ARCHITECTURES[0]:
            raise UserValueError(
                f"--base={self.base} has an architecture of its own. Leave --architecture={self.architecture} out."
            )
        if self.base is None and self.resolution is not None:
            if self.architecture == "HierarchicalVAE" and (self.resolution < 8 or self.resolution % 8):
                raise UserValueError(f"--resolution={self.resolution} must be a multiple of 8 for a HierarchicalVAE.")
            if self.architecture == "LightweightVAE" and self.resolution != 28 and self.resolution % 16:
                raise UserValueError(f"--resolution={self.resolution} must be 28, or a multiple of 16.")
        for name in ("beta", "group_penalty", "l2_penalty", "mean_penalty", "early_stopping_min_delta"):
            if not getattr(self, name) >= 0:
                raise UserValueError(f"--{name}={getattr(self, name)} must not be negative.")
        if not 0 < self.validation_fraction < 1:
            raise UserValueError(f"--validation_fraction={self.validation_fraction} must lie between 0 and 1.")
        if self.mode == "end-to-end" and self.base is not None:
            raise UserValueError(
                f"--mode={self.mode} with --base={self.base}: end-to-end starts from nothing. "
                "Choose frozen or fine-tune."
            )
        if self.published and self.context_weights:
            raise UserValueError("--published gives contexts turns, so --context_weights has no effect. Leave one out.")
        if self.streaming:
            raise UserValueError("An autoencoder's images are kept in memory. Leave --streaming out.")
        if self.early_stopping_patience is not None and self.validation_steps is None:
            raise UserValueError("--early_stopping_patience counts validations. Give --validation_steps, too.")
        if self.early_stopping_patience is None:
            refuse_useless(self, ["early_stopping_min_delta"], "--early_stopping_patience was not given")
        unread = ["caption_column", "class_column", "pair_column", "paired_files"]
        refuse_useless(self, unread, "An autoencoder reads images and contexts alone")

    def _choices(self) -> dict[str, tuple[str | None, ...]]:
        return {
            "architecture": ARCHITECTURES,
            "mode": MODES,
            "reconstruction": ("bce", "gaussian"),
            **super()._choices(),
        }

    def _minima(self) -> dict[str, float]:
        return {
            "resolution": 1,
            "num_frames": 1,
            "channels": 1,
            "num_validation_images": 0,
            "early_stopping_patience": 1,
            **super()._minima(),
        }
