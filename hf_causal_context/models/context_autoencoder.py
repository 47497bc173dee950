"""An autoencoder whose latent passes through the context module: the system of the paper as a Hugging Face model.

Markham et al., "Intervening to Learn and Compose Causally Disentangled Representations" (CLeaR 2026), section 3.
Shapes: B samples, C channels, S x S pixels, K concepts, N noise width, W concept width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from ..context_module import ContextModule, NoiseModule, Posterior
from ..contexts import ConceptSet, ContextBatch, as_context, as_contexts
from ..errors import UserValueError
from ..functional import normal_like
from .encoder_decoders import EncoderDecoder, base_from_config


class AutoencoderOutput(NamedTuple):
    """What `forward` returns.

    Attributes:
        output: (B, C, S, S), logits or pixels as the base decodes.
        kl: of the posterior from the prior in nats, (B,).
        mean: of the posterior of the exogenous coordinates, (B, K, N).
    """

    output: Tensor
    kl: Tensor
    mean: Tensor


class _FoundError(Exception):
    """Carries what was wanted out of a base's forward pass."""


class ContextAutoencoder(ModelMixin, ConfigMixin):
    """A context module between an encoder and a decoder, or in place of a hierarchical model's top latent.

    `sample`, `reconstruct`, `counterfactual` and `concepts` compute as in eval mode, whatever the mode is; `forward`,
    `encode` and `decode` in the mode that is set. Images and coordinates may be of any floating dtype, on any device.

    Args:
        concepts: their names, in the order of the intervention mask.
        base: an `EncoderDecoder`, a hierarchical model (see `latent_module`), or a configuration of one of this
            package: `{"class": "LightweightVAE", "size": 64}`.
        noise_width, concept_width, depth, perfect_interventions, encode_context, published: of the `ContextModule`.
        with_context_module: False leaves only the exogenous coordinates, for ablations; contexts then have no effect.
        ignore_contexts: every context counts as the observational one, for ablations.
        latent_module: name of the module in `base` that the context module replaces. It maps features (B,
            *base.latent_shape) to a latent of that shape and its KL divergence (B,). The base is then a whole model:
            `base(images, generator)` returns output and KL divergence, `base.sample(num, generator)` output.

    Raises:
        ValueError: for concepts or numbers that are not valid, an unknown base or no such module in it.

    Example:
        >>> model = ContextAutoencoder(("thick", "slant"), {"class": "LightweightVAE", "size": 28, "channels": 1})
        >>> model.sample("thick+slant", num=3).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self,
        concepts: Sequence[str],
        base: nn.Module | Mapping[str, Any],
        noise_width: int = 32,
        concept_width: int = 8,
        depth: int = 2,
        perfect_interventions: bool | None = None,
        encode_context: bool | None = None,
        published: bool = False,
        with_context_module: bool = True,
        ignore_contexts: bool = False,
        latent_module: str | None = None,
    ) -> None:
        super().__init__()
        self.concept_set = ConceptSet(cast(tuple[str, ...], concepts))
        self.backbone: Any = base if isinstance(base, nn.Module) else base_from_config(base)
        _check_base(self.backbone, latent_module)
        self.register_to_config(
            concepts=list(self.concept_set),
            base=_as_stored(self.backbone),
            noise_width=noise_width,
            concept_width=concept_width,
            depth=depth,
            perfect_interventions=perfect_interventions,
            encode_context=encode_context,
            published=published,
            with_context_module=with_context_module,
            ignore_contexts=ignore_contexts,
            latent_module=latent_module,
        )
        self.published, self.latent_module = published, latent_module
        self.with_context_module, self.ignore_contexts = with_context_module, ignore_contexts
        if latent_module is None:
            features = self.backbone.features
        else:
            names = [name for name, _ in self.backbone.named_modules() if name]
            if latent_module not in names:
                raise UserValueError(f"latent_module={latent_module!r} is no module of the base. It has: {names}.")
            self.backbone.get_submodule(latent_module).requires_grad_(False)  # what it computes is not used
            features = math.prod(self.backbone.latent_shape)
        sizes = (features, features, len(self.concept_set), noise_width)
        self.context_module = (
            ContextModule(*sizes, concept_width, depth, perfect_interventions, encode_context, published)
            if with_context_module
            else NoiseModule(*sizes)
        )
        self.backbone_is_frozen = False

    def train(self, mode: bool = True) -> ContextAutoencoder:
        """As of every module; a frozen backbone stays in eval mode, so that its batch norm keeps what it learned.

        The published experiments kept updating those statistics, and so does `published`.
        """
        super().train(mode)
        if self.backbone_is_frozen and not self.published:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> AutoencoderOutput:
        """Images (B, C, S, S) in [0, 1] and an intervention mask (B or 1, K) -> reconstructions and KL divergence."""
        mask = torch.zeros_like(mask) if self.ignore_contexts else mask
        if self.latent_module is None:
            posterior = self.context_module.encode(self.backbone.encode(images), mask)
            features = self.context_module(posterior.sample(generator), mask)
            return AutoencoderOutput(self.backbone.decode(features), posterior.kl(), posterior.mean)
        means: list[Tensor] = []

        def latent(features: Tensor) -> tuple[Tensor, Tensor]:
            posterior = self.context_module.encode(features.flatten(1), mask)
            means.append(posterior.mean)
            return self.context_module(posterior.sample(generator), mask).view_as(features), posterior.kl()

        with self._replaced(latent):
            output, kl = self.backbone(images, generator)
        if not means:
            raise self._never_called()
        return AutoencoderOutput(output, kl, means.pop())

    def encode(self, images: Tensor, context: ContextBatch = ()) -> Posterior:
        """Images (B, C, S, S) in [0, 1], drawn in a context -> the posterior of their exogenous coordinates.

        Raises:
            ValueError: for images of another shape, values outside [0, 1], unknown concepts, or another number of
                contexts.
        """
        self.check_images(images)
        images, mask = images.to(self.device, self.dtype), self.mask(context, len(images))
        if self.latent_module is None:
            return self.context_module.encode(self.backbone.encode(images), mask)

        def keep(features: Tensor) -> tuple[Tensor, Tensor]:
            raise _FoundError(features)

        try:
            with self._replaced(keep):
                self.backbone(images)
        except _FoundError as stop:
            return self.context_module.encode(cast(Tensor, stop.args[0]).flatten(1), mask)
        raise self._never_called()

    def decode(self, noise: Tensor, context: ContextBatch, generator: torch.Generator | None = None) -> Tensor:
        """Exogenous coordinates (B, K, N) in a context, or one per sample -> images (B, C, S, S) in [0, 1].

        The lower latents of a hierarchical base are drawn from its prior.

        Raises:
            ValueError: for coordinates of another shape, unknown concepts, or another number of contexts.
        """
        expected = (len(self.concept_set), self.context_module.noise_width)
        if noise.ndim != 3 or noise.shape[1:] != expected:
            raise UserValueError(
                f"Exogenous coordinates of shape {tuple(noise.shape)}; they must be (B, {expected[0]}, {expected[1]}): "
                "concepts and noise_width."
            )
        latent = self.context_module(noise.to(self.device, self.dtype), self.mask(context, len(noise)))
        if self.latent_module is None:
            return self._pixels(self.backbone.decode(latent))
        with self._replaced(_constant(latent)):
            return self._pixels(self.backbone.sample(len(noise), generator))

    @torch.no_grad()
    def sample(self, context: ContextBatch = (), num: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """`num` images (num, C, S, S) in [0, 1] in a context, or one context for each.

        Raises:
            ValueError: for unknown concepts, or another number of contexts than `num`.
        """
        shape = (num, len(self.concept_set), self.context_module.noise_width)
        noise = normal_like(torch.empty(shape, device=self.device, dtype=self.dtype), generator)
        with self._evaluated():
            return self.decode(noise, context, generator)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, context: ContextBatch = ()) -> Tensor:
        """Images (B, C, S, S), drawn in a context, as the model sees them: decoded from the posterior's mean.

        Raises:
            ValueError: as `encode` and `decode` do.
        """
        return self.counterfactual(images, from_context=context, to_context=context)

    @torch.no_grad()
    def counterfactual(self, images: Tensor, from_context: ContextBatch, to_context: ContextBatch) -> Tensor:
        """Return what images (B, C, S, S), drawn in one context, would have been in another, with the same noise.

        Abduction takes the posterior's mean in `from_context`; without `encode_context`, as in the paper, it is the
        same for all. A hierarchical base infers its lower latents from the images again. Compare with `reconstruct`
        to see what the model can represent at all.

        Raises:
            ValueError: as `encode` and `decode` do.
        """
        with self._evaluated():
            noise = self.encode(images, from_context).mean
            if self.latent_module is None:
                return self.decode(noise, to_context)
            latent = self.context_module(noise, self.mask(to_context, len(images)))
            images = images.to(self.device, self.dtype)
            with self._replaced(_constant(latent)):
                # The lower latents are drawn; always from the same numbers.
                return self._pixels(self.backbone(images, torch.Generator(self.device).manual_seed(0))[0])

    @torch.no_grad()
    def concepts(self, images: Tensor, context: ContextBatch = ()) -> Tensor:
        """Values of the concepts (B, K, W) in images (B, C, S, S) that were drawn in a context.

        Raises:
            ValueError: as `encode` and `decode` do.
        """
        with self._evaluated():
            return self.context_module.concepts(self.encode(images, context).mean, self.mask(context, len(images)))

    def mask(self, context: ContextBatch, num: int) -> Tensor:
        """Intervention mask (1 or num, K) of one context, or of one for each of `num` samples, on the model's device.

        Raises:
            ValueError: for unknown concepts, or another number of contexts.
        """
        if isinstance(context, Tensor):
            mask = self.concept_set.check_mask(context)
        else:
            mask = self.concept_set.mask(as_contexts(context) or (as_context(context),))
        if len(mask) not in (1, num):
            raise UserValueError(f"{len(mask)} contexts for {num} samples. Give one, or one for each sample.")
        mask = torch.zeros_like(mask) if self.ignore_contexts else mask
        return mask.to(self.device, self.dtype)

    def check_images(self, images: Tensor) -> None:
        """Raise a ValueError unless images are (B, C, S, S) in [0, 1]."""
        expected = (self.backbone.channels, self.backbone.size, self.backbone.size)
        if images.ndim != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise UserValueError(
                f"Images of shape {tuple(images.shape)} and dtype {images.dtype}; this autoencoder takes float "
                f"tensors (B, {', '.join(map(str, expected))}) with values in [0, 1]. Resize or convert them."
            )
        low, high = images.aminmax() if len(images) else (torch.zeros(()), torch.ones(()))
        if not (low >= 0 and high <= 1):  # NaN fails, too
            raise UserValueError(
                f"Images have values from {low:g} to {high:g}; they must lie in [0, 1]. Divide bytes by 255; for "
                "values in [-1, 1] take (x + 1) / 2."
            )

    def _never_called(self) -> UserValueError:
        return UserValueError(f"The base never called {self.latent_module!r}, so there is nothing to encode.")

    def _pixels(self, output: Tensor) -> Tensor:
        return output.sigmoid() if self.backbone.output == "logits" else output.clamp(0, 1)

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Within the body, in eval mode: batch norm would make images depend on others, and learn from them."""
        trained = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in trained:
                module.training = True

    @contextmanager
    def _replaced(self, latent: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Within the body, `latent` gives what the hierarchical base's latent module returns for its features."""
        replaced = self.backbone.get_submodule(self.latent_module)
        # Rather than a hook, which would let the module draw random numbers first.
        replaced.forward = lambda features, *_, **__: latent(features)
        try:
            yield
        finally:
            del replaced.forward


def _constant(latent: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a latent module's output (B, F) that is known, whatever the features (B, ...); without KL divergence."""
    return lambda features: (latent.view_as(features), latent.new_zeros(len(latent)))


def _as_stored(base: Any) -> dict[str, Any]:
    """Return the configuration of a base as JSON holds it: a stored one equals this one."""
    name = type(base).__name__
    try:
        return json.loads(json.dumps({"class": name, **base.config}))
    except TypeError as error:
        raise UserValueError(
            f"The base, of type {name}, has a config that JSON cannot hold ({error}). Keep in it what its constructor "
            "takes: numbers, texts, lists and mappings."
        ) from error


def _check_base(base: nn.Module, latent_module: str | None) -> None:
    name = type(base).__name__
    if latent_module is None and not isinstance(base, EncoderDecoder):
        raise UserValueError(
            f"The base, of type {name}, is no EncoderDecoder. Wrap an AutoencoderKL in KLAutoencoder(size, vae); of a "
            "hierarchical model name the module of its top latent: latent_module=."
        )
    own = ("features",) if latent_module is None else ("latent_shape", "sample")
    if missing := [part for part in ("config", "size", "channels", "output", *own) if not hasattr(base, part)]:
        example = "EncoderDecoder" if latent_module is None else "HierarchicalVAE"
        raise UserValueError(
            f"The base, of type {name}, has no {', '.join(missing)}. {example} shows what a base needs: set it before "
            "the base is passed."
        )
    if base.output not in ("logits", "pixels"):
        raise UserValueError(f"The base, of type {name}, has output={base.output!r}. It must be 'logits' or 'pixels'.")
