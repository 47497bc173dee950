"""Which row of a batch has which context: from samples to a model's rows, and from those to a layer's rows.

What cannot be known is an error, never a guess. Shapes: S samples, N rows of the model's input, n rows of a layer's
input, K concepts. Strengths have 1 + K columns: of the observational part, then of the concepts.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserValueError
from .callers import images_of_pipeline, inputs_of_pipeline
from .media import has_ragged_media, is_tower, may_see_media

# Where the rows of a model's input are counted, first match first; otherwise the first tensor is taken.
_INPUT_NAMES = ("sample", "hidden_states", "input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values")
_TOKENS = 128  # of a small image or a short text: how many a layer sees is not known before it runs
_ROUTED = re.compile("(?<!shared_)expert")  # such layers see some of the tokens, of any samples
# Where Qwen-Image embeds the times of the image and of those that it edits, all rows of the one after all of the other.
_STACKED = re.compile(r"^time_text_embed\.|\.img_mod\.")
# Architectures of transformers that transpose to (time, rows, features) before their layers.
_SEQUENCE_FIRST = ("longformer", "led", "xlnet", "fsmt", "mask2former", "oneformer", "bros")
# Those that put parts of all samples (the prompt's image, groups of queries) one after the other; some in training.
_STACKING, _STACKING_IN_TRAINING = ("seggpt",), ("lw_detr", "rf_detr")


@dataclass(frozen=True)
class Call:
    """What runs the model: a diffusers pipeline, or `generate` of transformers, with a number of prompts.

    Attributes:
        prompts: how many it was given.
        copies: how many images a pipeline makes of each; None for `generate`.
        repeats: how often `generate` repeats every prompt in place, where it does (beams, returned sequences).
        ragged: whether prompts of `generate` have different numbers or sizes of images, videos or sounds.
    """

    prompts: int
    copies: int | None
    repeats: int = 1
    ragged: bool = False

    def check(self, samples: int) -> None:
        """Refuse (ValueError) a number of contexts that is neither one per prompt nor one per image."""
        images = self.prompts * (self.copies or 1)
        if samples in (1, self.prompts, images):
            return
        if self.copies is None:
            raise UserValueError(
                f"{samples} contexts were given, but generate() was called with {self.prompts} "
                f"{'prompt' if self.prompts == 1 else 'prompts'}. Pass one context, or one per prompt. A pipeline of "
                "transformers runs prompts one by one; to give each a context, call it with batch_size=len(prompts)."
            )
        per_image = f", or one per image ({images})" if self.copies > 1 else ""
        raise UserValueError(
            f"{samples} contexts were given, but the pipeline was called with {self.prompts} prompts (or classes, "
            f"or rows). Pass one context, or one per prompt ({self.prompts}){per_image}."
        )

    def check_part(self, num_rows: int) -> None:
        """Refuse (ValueError) rows of a part of a pipeline's model that are neither one per prompt nor per image."""
        if self.copies is not None and num_rows not in (self.prompts, self.prompts * self.copies):
            raise UserValueError(
                f"A part of an adapted model (such as a VAE's decoder) was called with {num_rows} rows by a pipeline "
                f"that makes {self.prompts * self.copies} images or clips, so it cannot be known which row belongs to "
                "which prompt: frames of clips are decoded piece by piece. Use one context for all prompts."
            )

    def encodes_media(self, layer_name: str) -> bool:
        """Whether rows of a layer that runs before the model are those of media that stand beside the prompts."""
        return self.copies is None and may_see_media(layer_name) and (self.ragged or is_tower(layer_name))

    def rows(self, strengths: Tensor, num_rows: int) -> Tensor | None:
        """Strengths (S, 1 + K) for N rows of the model, or of a text encoder; None where they do not divide."""
        self.check(strengths.shape[0])
        if num_rows == strengths.shape[0] == self.prompts:
            return strengths
        images = self.prompts * (self.copies or 1)
        if num_rows % images:
            return None
        if self.copies is None:
            # Other multiples are a model's own, such as copies for guidance (Dia, Janus), and where these are is not
            # known.
            times = num_rows // self.prompts
            return strengths.repeat_interleave(times, 0) if times in (1, self.repeats) else None
        if strengths.shape[0] == self.prompts:
            # Pipelines interleave the images of a prompt and tile the guidance copies.
            strengths = strengths.repeat_interleave(self.copies, 0)
        return strengths.repeat(num_rows // images, 1)


def match_samples(
    strengths: Tensor, num_rows: int, images_per_prompt: int, guidance_copies: int, call: Call | None
) -> Tensor:
    """Turn strengths (S, 1 + K) into those of the N rows of the model's input: (1, 1 + K) or (N, 1 + K).

    Args:
        strengths: (S, 1 + K), of the observational part and of the concepts.
        num_rows: N.
        images_per_prompt: how many images a pipeline makes of each sample.
        guidance_copies: copies of the batch that it stacks for guidance.
        call: what runs the model, and knows how it multiplies samples.

    Raises:
        ValueError: when it cannot be known which row belongs to which sample, and for another number of contexts than
            of a pipeline's prompts or images: its rows for guidance are no images.
    """
    samples = strengths.shape[0]
    if samples == 1:
        return strengths
    if call is not None and (expanded := call.rows(strengths, num_rows)) is not None:
        return expanded
    if samples == num_rows:
        if call is None and (images := images_of_pipeline()) is not None:
            Call(*images).check(samples)
        check_inputs(samples)
        return strengths
    images = samples * images_per_prompt
    if num_rows in (images, images * guidance_copies):
        return strengths.repeat_interleave(images_per_prompt, 0).repeat(num_rows // images, 1)
    raise UserValueError(
        f"{samples} contexts were given, but the model's input has {num_rows} rows, and {samples} contexts x "
        f"{images_per_prompt} images_per_prompt x {guidance_copies} guidance_copies is another number. Pass one "
        "context, one per row, or say how a pipeline multiplies samples: intervene(pipe, contexts), or "
        "intervene(model, contexts, images_per_prompt=n, guidance_copies=2)."
    )


def check_inputs(samples: int) -> None:
    """Refuse (ValueError) another number of contexts than of the inputs of a pipeline of transformers that runs this.

    It puts so many of them into a batch, or pieces of them, and each batch would have the same contexts.
    """
    inputs = inputs_of_pipeline()
    if inputs not in (None, samples):
        what = "cuts its inputs into pieces" if inputs == 0 else f"has {inputs} inputs, and runs some of them at once"
        raise UserValueError(
            f"{samples} contexts were given to a pipeline of transformers that {what}, so it cannot be known which "
            "context belongs to which. Pass one context; or one per input, with batch_size=len(inputs), to a pipeline "
            "that does not cut them."
        )


def match_layer_rows(
    strengths: Tensor, num_rows: int, layer_name: str, ragged: bool, flat: bool = False, stacked: bool = False
) -> Tensor:
    """Turn strengths for the model's rows, (1 or N, 1 + K), into those for the n rows of a layer, (1 or n, 1 + K).

    Args:
        strengths: (1 or N, 1 + K).
        num_rows: n.
        layer_name: its path in the model; experts see the tokens routed to them, vision towers see images.
        ragged: samples differ in length, or in the images, videos or sounds that they have.
        flat: tokens cannot be told from samples, so that as many may have come to an expert by accident.
        stacked: copies of the batch follow each other; else what belongs to one sample stands together.

    Raises:
        ValueError: when n is no multiple of N, or rows need not be whole multiples per sample.
    """
    model_rows = strengths.shape[0]
    if model_rows == 1:
        return strengths
    routed = _ROUTED.search(layer_name) is not None
    if model_rows == num_rows and not (routed and flat) and not (ragged and may_see_media(layer_name)):
        return strengths
    if num_rows % model_rows or ragged or routed:
        raise UserValueError(
            f"Layer {layer_name!r} sees {num_rows} rows while the model's input has {model_rows} with different "
            "contexts, so it cannot be known which context belongs to which row (the layer's rows do not depend on the "
            "batch or time steps come before samples, or samples are ragged: of different lengths, or with different "
            "numbers of images, videos or sounds). Use one context for the whole batch, or leave the layer out with "
            "exclude_modules."
        )
    if stacked:
        return strengths.repeat(num_rows // model_rows, *(1,) * (strengths.ndim - 1))
    # Else flattening (frames, pixels, windows, tokens) is sample-major in the models of diffusers and transformers.
    return strengths.repeat_interleave(num_rows // model_rows, 0)


def is_stacked(model: nn.Module, layer_name: str) -> bool:
    """Whether a layer sees copies of the batch one after the other."""
    return getattr(model, "zero_cond_t", False) is True and _STACKED.search(layer_name) is not None


def refuse_other_orders(model: nn.Module) -> None:
    """Raise ValueError for a model whose layers see time steps before samples, or parts of the batch.

    A part may have as many rows as the whole, where each sample has several (frames, pixels).
    """
    if reason := _other_order(model):
        raise UserValueError(
            f"{type(model).__name__} {reason}, so different contexts in one batch cannot be told apart. Use one "
            "context for the whole batch."
        )


def _other_order(model: nn.Module) -> str | None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _SEQUENCE_FIRST:
        return "has layers that see time steps before samples"
    if model_type in _STACKING or (model.training and model_type in _STACKING_IN_TRAINING):
        return "puts parts of all samples one after the other"
    if torch.compiler.is_compiling():
        return None
    hooks: Any = getattr(model, "_diffusers_hook", None)
    faster = hooks and hooks.get_hook("faster_cache_denoiser")
    if faster and not faster.is_guidance_distilled:
        return "leaves the rows without a prompt out of some steps (FasterCache)"
    if not hasattr(model, "enable_forward_chunking"):  # no other model runs in pieces
        return None
    for module in model.modules():
        own = module.__dict__
        if own.get("split_dim") == 0 or (own.get("_chunk_size") is not None and own.get("_chunk_dim") == 0):
            return (
                "runs pieces of the batch one by one (enable_free_noise_split_inference of its pipeline, or "
                "enable_forward_chunking, which may have dim=1)"
            )
        if "PAG" in type(own.get("processor")).__name__ and any(hasattr(m, "conditioning") for m in module.modules()):
            return "has attention that runs parts of the batch one by one (perturbed-attention guidance)"
    return None


def input_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.device, int, bool, int]:
    """Device and number of rows of a model's input, whether its samples are ragged inside, and about how many tokens.

    Raises:
        ValueError: for a call without tensors.
    """
    named = [kwargs[name] for name in _INPUT_NAMES if kwargs.get(name) is not None]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            rows = value.shape[0]
            tokens = rows if value.ndim == 2 and value.is_floating_point() else rows * _TOKENS  # vectors have one
            return value.device, rows, has_ragged_media(model, _by_name(model, args, kwargs), rows), tokens
        if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
            return value[0].device, len(value), True, len(value) * _TOKENS  # tensors of their own lengths
    raise UserValueError(
        "The model was called without a tensor, so its rows cannot be matched to contexts. Pass the inputs as tensors."
    )


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model of transformers by their names, by which media are known."""
    if not args or not hasattr(model, "main_input_name"):
        return kwargs
    return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
