"""DiT: classes, on latents."""

from __future__ import annotations

from diffusers import DiffusionPipeline
from diffusers.models.embeddings import LabelEmbedding

from ..diffusion_base import DiffusionBase


class DiT(DiffusionBase):
    """DiTTransformer2DModel: class labels, a learned variance."""

    takes_captions = False
    fixed_size = True
    condition_argument = "class_labels"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.num_classes = self._config.num_embeds_ada_norm
        # Dropped labels teach the base guidance. It knows that, and they would come from the random state of a process.
        for module in self.denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    @property
    def _vae_scale(self) -> int:
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
