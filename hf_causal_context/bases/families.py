"""How the trainer sees a pretrained diffusers pipeline: one class for each family of denoisers.

Everything a family does in its own way is here: what its denoiser is trained on, how captions become tensors, how the
denoiser is called, and what its pipeline is called with. Conditions are dictionaries of row-wise tensors, so that they
can be cached, indexed and concatenated.

Shapes: B batch, C channels, H x W pixels or latent pixels, T text tokens, K concepts.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ..errors import UserValueError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


class DiffusionBase:
    """A pretrained pipeline, its frozen denoiser, and what the two are fed.

    Attributes:
        pipe: the pipeline; an adapter injected into `denoiser` is part of it.
        denoiser: the network that adapters are attached to.
        denoiser_name: "unet" or "transformer", the denoiser's name in the pipeline.
        is_latent: whether the denoiser is trained on latents of a VAE.
        takes_captions: whether it is conditioned on text.
        takes_guidance: whether the pipeline has a guidance scale.
        fixed_size: whether the pipeline generates at the default resolution only.
        condition_argument: the argument of the pipeline's call for captions or classes, None without one.
        sampling_options: further arguments of the pipeline's call, so that it does what training does.
        num_classes: how many class labels the denoiser is conditioned on, None without.
        in_channels: channels of what it is trained on.
        image_channels: channels of the images, 1 or 3.
        prediction: what it predicts; "flow" is noise - data.
        num_train_timesteps: the scheduler's number of time steps.

    Raises:
        ValueError: for a scheduler that no noise schedule for training follows from.
    """

    denoiser_name: ClassVar[str] = "transformer"
    is_latent: ClassVar[bool] = True
    takes_captions: ClassVar[bool] = True
    takes_guidance: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = False
    condition_argument: ClassVar[str | None] = "prompt"
    sampling_options: ClassVar[dict[str, Any]] = {}
    _input_name: ClassVar[str] = "hidden_states"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.denoiser = cast(nn.Module, getattr(pipe, self.denoiser_name))
        # The denoiser's own typing hides what its config holds.
        self._config: Any = self.denoiser.config
        self.num_classes: int | None = None
        self.in_channels: int = self._config.in_channels
        self.image_channels: int = pipe.vae.config.in_channels if self.is_latent else self.in_channels
        self._vae_scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1) if self.is_latent else 1
        self.prediction: Prediction = _prediction(pipe)
        self.num_train_timesteps: int = pipe.scheduler.config.num_train_timesteps

    @property
    def takes_classes(self) -> bool:
        """Whether the denoiser is conditioned on class labels (`conditions["class_labels"]`, integers (B,))."""
        return self.num_classes is not None

    @property
    def pipeline_tag(self) -> str:
        """The Hub's name of what the pipeline does."""
        return "text-to-image" if self.takes_captions else "unconditional-image-generation"

    def stock_call(
        self,
        *,
        prompt: str | None = None,
        class_label: int | None = None,
        resolution: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Arguments with which the stock pipeline makes one image of these conditions, without those that are None.

        A class that the pipeline has no argument for is not among them.
        """
        arguments = {**self.sampling_options, **options}
        if self.condition_argument is not None:
            arguments[self.condition_argument] = [class_label] if self.takes_classes else prompt or ""
        if resolution is not None and not self.fixed_size:
            arguments |= {"height": resolution, "width": resolution}
        return {name: value for name, value in arguments.items() if value is not None}

    @property
    def size_multiple(self) -> int:
        """Height and width of images must be multiples of it."""
        return self._vae_scale * self._config.patch_size

    @property
    def default_resolution(self) -> int:
        """Height and width in pixels that the pipeline generates.

        Raises:
            ValueError: for a base that names none, or images that are not square.
        """
        size = self._config.sample_size
        if isinstance(size, list | tuple):
            size = size[0] if len(set(size)) == 1 else None
        if size is None:
            raise UserValueError(
                f"The base's {self.denoiser_name} has sample_size={self._config.sample_size!r}, which is no default "
                "resolution for square images. Pass a resolution, or set sample_size in its config.json."
            )
        return size * self._vae_scale

    def noise_scheduler(self) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
        """Return a new scheduler that adds noise as the base's own does."""
        scheduler = FlowMatchEulerDiscreteScheduler if self.prediction == "flow" else DDPMScheduler
        # The declared result is a pair too, for an argument that is not passed.
        return cast(Any, scheduler).from_config(self.pipe.scheduler.config)

    def move_encoders(self, device: torch.device | str) -> None:
        """Move all but the denoiser: what nobody needs while cached latents and captions are trained on."""
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module) and component is not self.denoiser:
                component.to(device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> what the denoiser is trained on: latents, or the images themselves.

        Latents are the mode of the VAE's posterior, normalized as the pipeline expects.

        Raises:
            ValueError: for another number of channels, or a size that the base cannot work with.
        """
        if (
            pixels.ndim != 4
            or pixels.shape[1] != self.image_channels
            or any(n % self.size_multiple for n in pixels.shape[2:])
        ):
            raise UserValueError(
                f"Images of shape {tuple(pixels.shape)} do not fit the base: it takes (rows, {self.image_channels}, "
                f"height, width) with height and width multiples of {self.size_multiple}. Convert or resize them."
            )
        if not self.is_latent:
            return pixels
        vae = self.pipe.vae
        dtype = vae.dtype
        # Encoders of this kind overflow in half precision.
        vae.to(torch.float32 if dtype == torch.float16 else dtype)
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        vae.to(dtype)
        return self._normalize(latents).to(pixels.dtype)

    @torch.no_grad()
    def decode_images(self, data: Tensor) -> Tensor:
        """What the denoiser models (B, C, H, W), latents or images -> images in [0, 1]; undoes `encode_images`."""
        if self.is_latent:
            vae = self.pipe.vae
            dtype = vae.dtype
            vae.to(torch.float32 if dtype == torch.float16 else dtype)  # as in `encode_images`
            latents = self._denormalize(data).to(vae.device, vae.dtype)
            data = vae.decode(latents, return_dict=False)[0].to(data.dtype)
            vae.to(dtype)
        return (data / 2 + 0.5).clamp(0, 1)

    def _normalize(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def _denormalize(self, latents: Tensor) -> Tensor:
        # Normalizing is affine: its inverse follows from where it takes 0 and 1.
        offset = self._normalize(torch.zeros_like(latents[:1]))
        return (latents - offset) / (self._normalize(torch.ones_like(latents[:1])) - offset)

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Captions -> conditions, one row for each.

        Raises:
            ValueError: for a base without captions.
        """
        raise UserValueError(
            f"{type(self.pipe).__name__} takes no captions. Leave them out, or use a text-to-image base."
        )

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        """Return the denoiser's prediction (B, C, H, W), called as the family's pipeline does it.

        Args:
            model: the denoiser with its adapter, or a wrapper around it.
            noisy: (B, C, H, W).
            timesteps: (B,) in the scheduler's units; for flows sigma * num_train_timesteps, as floats.
            conditions: of `encode_captions`, or {"class_labels": (B,)}, or empty.
            context: intervention mask (B, K); None inside `intervene`.
        """
        arguments = self._arguments(noisy, timesteps, conditions)
        # Some denoisers predict a variance too, in further channels.
        return model(**arguments, context=context, return_dict=False)[0][:, : noisy.shape[1]]

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        return {self._input_name: noisy, "timestep": timesteps, **conditions}


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


class StableDiffusion(DiffusionBase):
    """Stable Diffusion 1 and 2: one CLIP encoder."""

    denoiser_name = "unet"
    _input_name = "sample"

    @property
    def size_multiple(self) -> int:
        return max(8, self._vae_scale)  # the pipeline refuses others

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        pipe = self.pipe
        return {"encoder_hidden_states": pipe.encode_prompt(captions, pipe.text_encoder.device, 1, False)[0]}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two CLIP encoders, the second one's pooled output, and sizes as further conditions."""

    def _normalize(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super()._normalize(latents)
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) * config.scaling_factor / std

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            captions, device=self.pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        height, width = (n * self._vae_scale for n in noisy.shape[2:])
        text = conditions["text_embeds"]
        # Original size, top left corner, target size: the pipeline's defaults, so that training and sampling agree.
        sizes = text.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
        return {
            "sample": noisy,
            "timestep": timesteps,
            "encoder_hidden_states": conditions["encoder_hidden_states"],
            "added_cond_kwargs": {"text_embeds": text, "time_ids": sizes},
        }


class StableDiffusion3(DiffusionBase):
    """Stable Diffusion 3: two CLIP encoders and T5, flow matching."""

    def _normalize(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            captions, captions, captions, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


class Flux(StableDiffusion3):
    """Flux: CLIP and T5, flow matching on latents packed into 2 x 2 patches."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        self.in_channels //= 4

    @property
    def size_multiple(self) -> int:
        return 2 * self._vae_scale

    @property
    def default_resolution(self) -> int:
        return self.pipe.default_sample_size * self._vae_scale

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, pooled, _ = self.pipe.encode_prompt(captions, device=self.pipe.text_encoder.device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor], context: Tensor | None
    ) -> Tensor:
        arguments = self._arguments(noisy, timesteps, conditions)
        packed = model(**arguments, context=context, return_dict=False)[0]
        return F.pixel_shuffle(packed.mT.unflatten(2, [n // 2 for n in noisy.shape[2:]]), 2)

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        rows, columns = (torch.arange(n // 2, device=noisy.device, dtype=noisy.dtype) for n in noisy.shape[2:])
        # Data are predicted without amplified guidance; 1 is no amplification.
        guidance = noisy.new_ones(len(noisy), dtype=torch.float32) if self._config.guidance_embeds else None
        return {
            "hidden_states": F.pixel_unshuffle(noisy, 2).flatten(2).mT,
            "timestep": timesteps / 1000,
            "guidance": guidance,
            "img_ids": torch.cartesian_prod(rows.new_zeros(1), rows, columns),
            "txt_ids": noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
            **conditions,
        }


class PixArt(DiffusionBase):
    """PixArt-alpha and -sigma: T5 with its attention mask, a learned variance."""

    # Cleaning needs packages that may be missing; binning would generate at another resolution than was trained.
    sampling_options: ClassVar[dict[str, Any]] = {"clean_caption": False, "use_resolution_binning": False}

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        hidden, attention_mask, _, _ = self.pipe.encode_prompt(
            captions, False, device=self.pipe.text_encoder.device, clean_caption=False
        )
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": attention_mask}

    def _arguments(self, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> dict[str, Any]:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:
            height, width = (n * self._vae_scale for n in noisy.shape[2:])
            values = noisy.new_tensor([height, width, height / width]).expand(len(noisy), -1)
            added = {"resolution": values[:, :2], "aspect_ratio": values[:, 2:]}
        return {**super()._arguments(noisy, timesteps, conditions), "added_cond_kwargs": added}


def _prediction(pipe: DiffusionPipeline) -> Prediction:
    scheduler = pipe.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample") or "beta_schedule" not in scheduler.config:
        raise UserValueError(
            f"The base's scheduler {type(scheduler).__name__} with prediction_type={prediction!r} has no noise "
            "schedule that training can use. Allowed: FlowMatchEulerDiscreteScheduler, or a scheduler with a "
            "beta_schedule that predicts 'epsilon', 'v_prediction' or 'sample', such as DDPMScheduler. Save the base "
            "with one of them."
        )
    return prediction


FAMILIES: dict[str, type[DiffusionBase]] = {
    "DDPMPipeline": PixelUNet,
    "DDIMPipeline": PixelUNet,
    "DiTPipeline": DiT,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
}
