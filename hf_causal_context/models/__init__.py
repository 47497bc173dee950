"""ContextAutoencoder and the encoder-decoders it is built around; data files of small pretrained bases."""

from .context_autoencoder import ContextAutoencoder
from .encoder_decoders import EncoderDecoder, KLAutoencoder, LightweightVAE
from .hierarchical_vae import HierarchicalVAE

__all__ = ["ContextAutoencoder", "EncoderDecoder", "HierarchicalVAE", "KLAutoencoder", "LightweightVAE"]
