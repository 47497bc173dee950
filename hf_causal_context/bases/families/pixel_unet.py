"""UNets on pixels: DDPM and DDIM."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from ..diffusion_base import DiffusionBase


class PixelUNet(DiffusionBase):
    """UNet2DModel on pixels, unconditional or with class labels."""

    denoiser_name = "unet"
    is_latent = False
    takes_captions = False
    takes_guidance = False
    fixed_size = True
    condition_argument = None
    _input_name = "sample"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.num_classes = self._config.num_class_embeds

    @property
    def size_multiple(self) -> int:
        return 2 ** (len(self._config.block_out_channels) - 1)
