"""Encoder-decoders that a `ContextAutoencoder` is built around: images -> features, and features -> images.

Shapes: B samples, C channels, S x S pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..errors import UserValueError
from .hierarchical_vae import HierarchicalVAE


class EncoderDecoder(nn.Module):
    """The base class of encoder-decoders; subclass it for one of your own.

    `config` rebuilds it: the arguments of its constructor, as JSON can hold them. `size` and `channels` are of its
    images, `features` is F, and `output` says what `decode` returns: "logits" of pixels, or "pixels" in [0, 1].
    """

    config: dict[str, Any]
    size: int
    channels: int
    features: int
    output: Literal["logits", "pixels"] = "logits"

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S) in [0, 1] -> features (B, F)."""
        raise NotImplementedError

    def decode(self, features: Tensor) -> Tensor:
        """Features (B, F) -> `output` (B, C, S, S)."""
        raise NotImplementedError


class LightweightVAE(EncoderDecoder):
    """The "lightweight VAE" of the paper's experiments: 128 features.

    28 x 28: two convolutions of stride 2 and one over all that is left, batch norm before ReLU. Multiples of 16: four
    convolutions of stride 2, ReLU before batch norm; published for 64 x 64.

    Args:
        size: side S of the images, 28 or a multiple of 16.
        channels: C, 3 for RGB.

    Raises:
        ValueError: for another size, or no channels.
    """

    features = 128

    def __init__(self, size: int = 64, channels: int = 3) -> None:
        if size != 28 and (size < 16 or size % 16):
            raise UserValueError(f"size={size} must be 28 or a multiple of 16. Resize the images.")
        if channels < 1:
            raise UserValueError(f"channels={channels} must be at least 1.")
        super().__init__()
        self.config = {"size": size, "channels": channels}
        self.size, self.channels = size, channels
        widths = (channels, 32, 64) if size == 28 else (channels, 32, 64, 128, 256)
        kernels = [(4, 2, 1)] * (len(widths) - 1)
        if size == 28:
            widths, kernels, side = (*widths, 128), [*kernels, (7, 1, 0)], 1
        else:
            side = size // 16
        activation = _norm_relu if size == 28 else _relu_norm
        flat = widths[-1] * side**2
        self.encoder = nn.Sequential(
            *_stack(nn.Conv2d, widths, kernels, activation, last=True),
            nn.Flatten(),
            nn.Linear(flat, self.features),
            nn.ReLU(),
        )
        self.decoder = nn.Sequential(
            nn.Linear(self.features, self.features),
            nn.ReLU(),
            *(() if size == 28 else (nn.Linear(self.features, flat), nn.ReLU())),
            nn.Unflatten(1, (widths[-1], side, side)),
            *_stack(nn.ConvTranspose2d, widths[::-1], kernels[::-1], activation, last=False),
        )

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, features: Tensor) -> Tensor:
        return self.decoder(features)


def _stack(
    convolution: Callable[..., nn.Module],
    widths: Sequence[int],
    kernels: Sequence[tuple[int, int, int]],
    activation: Callable[[int], list[nn.Module]],
    *,
    last: bool,
) -> list[nn.Module]:
    """Convolutions, each followed by `activation`; the last one of all only if `last`."""
    layers: list[nn.Module] = []
    for i, (before, after, kernel) in enumerate(zip(widths, widths[1:], kernels, strict=False)):
        layers.append(convolution(before, after, *kernel))
        if last or i < len(kernels) - 1:
            layers.extend(activation(after))
    return layers


def _relu_norm(width: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.BatchNorm2d(width)]


def _norm_relu(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU()]


class KLAutoencoder(EncoderDecoder):
    """A diffusers `AutoencoderKL`: its latents, scaled to unit variance and flattened, are the features.

    Args:
        size: side S of the images; it determines F.
        vae: the pretrained model, or its configuration.

    Raises:
        ValueError: for a size that the model cannot halve as often as it does.
    """

    output = "pixels"
    scale: float | Tensor
    shift: float | Tensor

    def __init__(self, size: int, vae: AutoencoderKL | Mapping[str, Any]) -> None:
        super().__init__()
        if isinstance(vae, Mapping):
            vae = cast(AutoencoderKL, AutoencoderKL.from_config(dict(vae)))
        settings = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
        reduction = 2 ** (len(settings["block_out_channels"]) - 1)
        if size < reduction or size % reduction:
            raise UserValueError(f"size={size} must be a multiple of {reduction}, by which this AutoencoderKL reduces.")
        self.config = {"size": size, "vae": settings}
        self.size, self.channels = size, settings["in_channels"]
        self.latent_shape = (settings["latent_channels"], size // reduction, size // reduction)
        self.features = settings["latent_channels"] * (size // reduction) ** 2
        scale, mean, std = float(settings["scaling_factor"]), settings.get("latents_mean"), settings.get("latents_std")
        if mean is None or std is None:
            self.scale, self.shift = scale, float(settings.get("shift_factor") or 0)
        else:  # in place of the shift, as in diffusers' pipelines; with the model they move to its device
            self.register_buffer("scale", scale / _per_channel(std), persistent=False)
            self.register_buffer("shift", _per_channel(mean), persistent=False)
        self.vae = vae

    def encode(self, images: Tensor) -> Tensor:
        latents = cast(Any, self.vae).encode(images * 2 - 1).latent_dist.mean
        return ((latents - self.shift) * self.scale).flatten(1)

    def decode(self, features: Tensor) -> Tensor:
        latents = features.unflatten(1, self.latent_shape) / self.scale + self.shift
        return (cast(Any, self.vae).decode(latents).sample + 1) / 2


def _per_channel(values: Sequence[float]) -> Tensor:
    """One number for each channel -> what latents (B, C, h, w) are computed with."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


BASES: dict[str, type[nn.Module]] = {base.__name__: base for base in (LightweightVAE, KLAutoencoder, HierarchicalVAE)}


def base_from_config(config: Mapping[str, Any]) -> nn.Module:
    """Build the base that a configuration describes: the name of a class of this package, and its arguments.

    Raises:
        ValueError: for a class that is not one of `BASES`: an autoencoder's file is data, and never names code.
    """
    if not isinstance(config, Mapping):
        raise UserValueError(
            f'base={config!r} must be a model, or a mapping such as {{"class": "LightweightVAE", "size": 64}}.'
        )
    arguments = dict(config)
    name = arguments.pop("class", None)
    if not isinstance(name, str) or name not in BASES:
        raise UserValueError(
            f"This autoencoder is built around {name!r}. Known: {', '.join(BASES)}. Pass a base of your own as an "
            "object: ContextAutoencoder.from_pretrained(folder, base=MyEncoderDecoder(...))."
        )
    try:
        return BASES[name](**arguments)
    except TypeError as error:
        raise UserValueError(f"The configuration {arguments} does not describe a {name}: {error}.") from error
