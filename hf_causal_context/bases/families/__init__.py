"""The families of denoisers that can be trained: the class of a pipeline -> how the trainer sees it."""

from __future__ import annotations

from ..diffusion_base import DiffusionBase
from .aura_flow import AuraFlow
from .chroma import Chroma
from .cogvideox import CogVideoX
from .cogview4 import CogView4
from .dit import DiT
from .flux import Flux
from .flux2 import Flux2
from .hidream_image import HiDreamImage
from .hunyuan_image import HunyuanImage
from .hunyuan_video import HunyuanVideo
from .krea2 import Krea2
from .ltx import LTX
from .lumina2 import Lumina2
from .mochi import Mochi
from .pixart import PixArt
from .pixel_unet import PixelUNet
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .wan import Wan
from .z_image import ZImage

FAMILIES: dict[str, type[DiffusionBase]] = {
    "DDPMPipeline": PixelUNet,
    "DDIMPipeline": PixelUNet,
    "DiTPipeline": DiT,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2,
    "QwenImagePipeline": QwenImage,
    "ChromaPipeline": Chroma,
    "Krea2Pipeline": Krea2,
    "ZImagePipeline": ZImage,
    "SanaPipeline": Sana,
    "Lumina2Pipeline": Lumina2,
    "AuraFlowPipeline": AuraFlow,
    "CogView4Pipeline": CogView4,
    "HunyuanImagePipeline": HunyuanImage,
    "HiDreamImagePipeline": HiDreamImage,
    "WanPipeline": Wan,
    "LTXPipeline": LTX,
    "CogVideoXPipeline": CogVideoX,
    "HunyuanVideoPipeline": HunyuanVideo,
    "MochiPipeline": Mochi,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
}
