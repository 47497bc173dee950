"""A pretrained diffusers pipeline as the trainer sees it: what every family of denoisers has in common.

Everything a family does in its own way is a method here, and is overridden in its file in `families`: what its denoiser
is trained on, how captions become tensors, how the denoiser is called, and what its pipeline is called with. Conditions
are dictionaries of row-wise tensors, so that they can be cached, indexed and concatenated.

Shapes: B batch, C channels, H x W pixels or latent pixels, T text tokens, K concepts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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
        is_video: whether it makes clips: with an axis of frames before height and width.
        frame_rate: of its clips, per second.
        fixed_size: whether the pipeline generates at the default resolution only.
        image_stream: which output of a transformer's joint block is the image's, by its index; the other is the text's.
        passes_sigmas: whether the pipeline gives its flow scheduler noise levels, even between 1 and 0.
        encodes_together: whether the captions of a batch go through an encoder in one call.
        condition_argument: the argument of the pipeline's call for captions or classes, None without one.
        num_classes: how many class labels the denoiser is conditioned on, None without.
        in_channels: channels of what it is trained on.
        prediction: what it predicts; "flow" is noise - data.
        num_train_timesteps: the scheduler's number of time steps.

    Raises:
        ValueError: for a scheduler that no noise schedule for training follows from.
    """

    denoiser_name: str = "transformer"
    is_latent: ClassVar[bool] = True
    takes_captions: ClassVar[bool] = True
    takes_guidance: ClassVar[bool] = True
    is_video: ClassVar[bool] = False
    frame_rate: int = 1
    fixed_size: ClassVar[bool] = False
    image_stream: ClassVar[int] = -1
    passes_sigmas: ClassVar[bool] = False
    encodes_together: ClassVar[bool] = True
    condition_argument: ClassVar[str | None] = "prompt"
    _input_name: ClassVar[str] = "hidden_states"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.use_denoiser(self.denoiser_name)
        self.num_classes: int | None = None
        self.in_channels: int = self._config.in_channels
        self.prediction: Prediction = _prediction(pipe)
        self.num_train_timesteps: int = pipe.scheduler.config.num_train_timesteps

    def use_denoiser(self, name: str) -> None:
        """Take the component of this name for the denoiser, where a pipeline has two for several levels of noise."""
        self.denoiser_name = name
        self.denoiser = cast(nn.Module, getattr(self.pipe, name))
        # The denoiser's own typing hides what its config holds.
        self._config: Any = self.denoiser.config

    @property
    def noise_range(self) -> tuple[float, float]:
        """Which time steps the denoiser serves, as shares of all; the upper end is another denoiser's, except 1."""
        return 0.0, 1.0

    @property
    def image_channels(self) -> int:
        """Channels of the images, 1 or 3."""
        return self.pipe.vae.config.in_channels if self.is_latent else self.in_channels

    @property
    def _vae_scale(self) -> int:
        """Pixels per latent pixel, along each side."""
        return self.pipe.vae_scale_factor if self.is_latent else 1

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The networks that captions go through, by the names of their components."""
        components = self.pipe.components.items()
        return {name: part for name, part in components if name.startswith("text_encoder") and part is not None}

    @property
    def takes_classes(self) -> bool:
        """Whether the denoiser is conditioned on class labels (`conditions["class_labels"]`, integers (B,))."""
        return self.num_classes is not None

    @property
    def sampling_options(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call, so that it does what training does."""
        return {}

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
        if (scale := arguments.pop("guidance_scale", None)) is not None:
            arguments |= self.guidance_options(scale)
        if self.condition_argument is not None:
            arguments[self.condition_argument] = [class_label] if self.takes_classes else prompt or ""
        if resolution is not None and not self.fixed_size:
            arguments |= {"height": resolution, "width": resolution}
        return {name: value for name, value in arguments.items() if value is not None}

    def guidance_options(self, scale: float, rows: int = 1) -> dict[str, Any]:
        """Arguments of the pipeline's call that guide it at a scale, for so many prompts."""
        return {"guidance_scale": scale}

    @property
    def size_multiple(self) -> int:
        """Height and width of images must be multiples of it."""
        return self._vae_scale * self._config.patch_size

    @property
    def default_frames(self) -> int:
        """Frames of the clips that the pipeline generates."""
        return 1

    def check_frames(self, num_frames: int | None) -> None:
        """Refuse numbers of frames that the base does not take.

        Raises:
            ValueError: with the nearest that it takes.
        """
        if num_frames is not None:
            raise UserValueError(
                f"num_frames={num_frames} was given, but {type(self.pipe).__name__} makes images. Leave it out."
            )

    def check_steps(self, num_inference_steps: int) -> None:
        """Refuse more steps of sampling than there are to take; those of a flow can be as small as one likes.

        Raises:
            ValueError: naming the number that there is.
        """
        if self.prediction != "flow" and num_inference_steps > self.num_train_timesteps:
            raise UserValueError(
                f"num_inference_steps={num_inference_steps}, but the base was trained with "
                f"{self.num_train_timesteps} levels of noise, and sampling takes each of them once at most. Lower it."
            )

    def require_images(self, what: str) -> None:
        """Refuse a base of videos, for something that is made for images.

        Raises:
            ValueError: naming it.
        """
        if self.is_video:
            raise UserValueError(f"{what} is for images, and {type(self.pipe).__name__} makes videos.")

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
        if self.prediction == "flow":
            return self.euler_scheduler()
        # The declared result is a pair too, for an argument that is not passed.
        return cast(Any, DDPMScheduler).from_config(self.pipe.scheduler.config)

    def euler_scheduler(self, **changes: Any) -> FlowMatchEulerDiscreteScheduler:
        """Return a new Euler scheduler of the base's flow, with what its own scheduler has for one, and changes."""
        known = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
        config = {name: value for name, value in self.pipe.scheduler.config.items() if name in known}
        return FlowMatchEulerDiscreteScheduler(**{**config, **changes})

    def flow_schedule(self, num_steps: int, latents: Tensor) -> dict[str, Any]:
        """Arguments with which a `FlowMatchEulerDiscreteScheduler` takes the time steps of the family's pipeline.

        Args:
            num_steps: of sampling.
            latents: (B, C, H, W), whose size shifts the schedule of some bases.
        """
        scheduler = self.pipe.scheduler
        config = scheduler.config
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            own: Any = type(scheduler).from_config(config)
            own.set_timesteps(num_steps)
            return {"sigmas": own.sigmas[:-1].tolist()}
        options: dict[str, Any] = {"sigmas": np.linspace(1, 1 / num_steps, num_steps)} if self.passes_sigmas else {}
        if not config.use_dynamic_shifting:
            return options
        # Linear in the number of tokens, of 2 x 2 latents.
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        tokens = latents[0, 0].numel() // 4
        return {**options, "mu": config.base_shift + slope * (tokens - config.base_image_seq_len)}

    def enable_gradient_checkpointing(self) -> None:
        """Let the denoiser compute activations again in backward, instead of keeping them."""
        cast(Any, self.denoiser).enable_gradient_checkpointing()

    def move_encoders(self, device: torch.device | str) -> None:
        """Move all but the denoiser: what nobody needs while cached latents and captions are trained on."""
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module) and component is not self.denoiser:
                component.to(device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> what the denoiser is trained on: latents, or the images themselves.

        Bases of videos take clips (B, C, F, H, W), here and below.

        Latents are the mode of the VAE's posterior, normalized as the pipeline expects.

        Raises:
            ValueError: for another number of channels, or a size that the base cannot work with.
        """
        if (
            pixels.ndim != 4 + self.is_video
            or pixels.shape[1] != self.image_channels
            or any(n % self.size_multiple for n in pixels.shape[-2:])
        ):
            frames = "frames, " if self.is_video else ""
            raise UserValueError(
                f"Images of shape {tuple(pixels.shape)} do not fit the base: it takes (rows, {self.image_channels}, "
                f"{frames}height, width) with height and width multiples of {self.size_multiple}. Convert or resize "
                "them."
            )
        if self.is_video:
            self.check_frames(pixels.shape[2])
        if not self.is_latent:
            return pixels
        with _not_half(self.pipe.vae) as vae:
            latents = self._encode(pixels.to(_computed_on(vae), vae.dtype))
        return self._normalize(latents).to(pixels.dtype)

    @torch.no_grad()
    def decode_images(self, data: Tensor) -> Tensor:
        """What the denoiser models (B, C, H, W), latents or images -> images in [0, 1]; undoes `encode_images`."""
        if self.is_latent:
            with _not_half(self.pipe.vae) as vae:
                latents = self._denormalize(data).to(_computed_on(vae), vae.dtype)
                data = self._decode(latents).to(data.dtype)
        return (data / 2 + 0.5).clamp(0, 1)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.pipe.vae.encode(pixels).latent_dist.mode()

    def _decode(self, latents: Tensor) -> Tensor:
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def _normalize(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, as the VAE's config has them, to be used on latents."""
        config, shape = self.pipe.vae.config, (-1, *(1,) * (latents.ndim - 2))
        return latents.new_tensor(config.latents_mean).view(shape), latents.new_tensor(config.latents_std).view(shape)

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

    def encode_captions_with_gradients(self, captions: list[str]) -> dict[str, Tensor]:
        """`encode_captions`, which families do under `torch.no_grad`, without that: for encoders that are trained."""
        return inspect.unwrap(type(self).encode_captions)(self, captions)

    def join_conditions(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Conditions of single rows -> those of a batch: where lengths differ, zeros follow, in masks as well.

        Args:
            rows: each what `encode_captions` returned for one caption, without the row axis; of one call or of several.
        """
        return {name: _stacked([row[name] for row in rows]) for name in rows[0]}

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


@contextmanager
def _not_half(vae: Any) -> Iterator[Any]:
    """Autoencoders overflow in half precision: within the body, one of that kind is in single precision."""
    half = vae.dtype == torch.float16
    if half:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if half:
            vae.to(torch.float16)


def _computed_on(vae: Any) -> torch.device | str | int:
    """Offloading moves an autoencoder to another device when it is called, and not what it is called with."""
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
    return vae.device if device is None else device


def _stacked(rows: list[Tensor]) -> Tensor:
    same = len({row.shape for row in rows}) == 1
    return torch.stack(rows) if same else pad_sequence(rows, batch_first=True)


def _prediction(pipe: DiffusionPipeline) -> Prediction:
    scheduler = pipe.scheduler
    prediction = scheduler.config.get("prediction_type", "epsilon")
    is_flow = prediction == "flow_prediction" and scheduler.config.get("use_flow_sigmas")
    if is_flow or isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow"
    if prediction not in ("epsilon", "v_prediction", "sample") or "beta_schedule" not in scheduler.config:
        raise UserValueError(
            f"The base's scheduler {type(scheduler).__name__} with prediction_type={prediction!r} has no noise "
            "schedule that training can use. Allowed: FlowMatchEulerDiscreteScheduler, a scheduler with "
            "use_flow_sigmas that predicts 'flow_prediction', or one with a beta_schedule that predicts 'epsilon', "
            "'v_prediction' or 'sample', such as DDPMScheduler. Save the base with one of them."
        )
    return prediction
