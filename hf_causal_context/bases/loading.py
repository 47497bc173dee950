"""Loads the pretrained pipeline that an adapter is trained for, or used on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from transformers import AutoConfig

from ..errors import UserValueError
from ..messages.wording import nearest, quoted
from .diffusion_base import DiffusionBase
from .families import FAMILIES
from .gguf import check_gguf, load_denoiser
from .names import check_there, unpacked, why_unread
from .quantization import pipeline_quantization


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    gguf_file: str | None = None,
    token: str | bool | None = None,
) -> DiffusionBase:
    """Load a pipeline that can be trained and measured, from a folder or the Hub; see `load_pipeline`.

    Args:
        name_or_path: folder or Hub id.
        revision: of the base.
        variant: of its files, such as "fp16".
        dtype: of all components.
        quantization: one of `QUANTIZATIONS`.
        gguf_file: with the transformer's weights, instead of its own; see `find_gguf`.
        token: for a private one.

    Raises:
        OSError, ValueError: what `check_base`, `check_gguf` and `load_denoiser` raise.
    """
    check_gguf(gguf_file, quantization)
    components = check_base(name_or_path, revision, token)  # before the weights, which may be many gigabytes
    options: dict[str, Any] = {"revision": revision, "variant": variant, "dtype": dtype, "token": token}
    if quantization is not None:
        options["quantization_config"] = pipeline_quantization(quantization, components, dtype)
    if gguf_file is not None:
        if _has_two_denoisers(components):
            raise UserValueError(
                f"--gguf_file={gguf_file} has the weights of one denoiser, and this base has two. Leave it out, or "
                "give --quantization."
            )
        base = unpacked(name_or_path)
        options |= load_denoiser(gguf_file, base, components, dtype=dtype, revision=revision, token=token)
    return as_base(_load(name_or_path, **options))


def load_pipeline(name_or_path: str, **options: Any) -> DiffusionPipeline:
    """Load any pipeline from a folder or the Hub; by default only safetensors, and no code from the repository.

    All components have the same dtype, by default float32. Unasked, those of diffusers would be float32 and those of
    transformers what they were saved in, and half of one kind does not multiply with the other.

    `hf_causal_context/models/digit_base` is the one that comes with this package, wherever that is installed.

    Args:
        name_or_path: folder or Hub id.
        options: of diffusers' `from_pretrained`.

    Raises:
        OSError: for something that is not a saved pipeline, such as a bare denoiser.
        ValueError: for options that do not fit it.
    """
    _read_index(name_or_path, options.get("revision"), options.get("token"))
    return _load(name_or_path, **options)


def _load(name_or_path: str, **options: Any) -> DiffusionPipeline:
    if "torch_dtype" not in options:  # diffusers' older word for it
        options.setdefault("dtype", torch.float32)
    try:
        return DiffusionPipeline.from_pretrained(unpacked(name_or_path), **{"use_safetensors": True, **options})
    except (ValueError, ImportError) as error:  # no files of this variant, a package that a part needs
        raise UserValueError(f"The base {str(name_or_path)!r} cannot be loaded: {error}") from error


def check_base(name_or_path: str, revision: str | None = None, token: str | bool | None = None) -> dict[str, Any]:
    """Refuse what is no base, without loading it; return its model_index.json.

    Raises:
        OSError: for something that is not a saved pipeline, such as a bare denoiser.
        ValueError: for a pipeline that is not supported.
    """
    index = _read_index(name_or_path, revision, token)
    _family(index.get("_class_name"))
    return index


def _read_index(name_or_path: str, revision: str | None, token: str | bool | None) -> dict[str, Any]:
    check_there(name_or_path)
    name_or_path = unpacked(name_or_path)
    try:
        return cast(Any, DiffusionPipeline.load_config(name_or_path, revision=revision, token=token))
    except OSError as error:
        if _is_transformers_model(name_or_path, revision, token):
            raise OSError(
                f"{str(name_or_path)!r} is a model of transformers, not a diffusers pipeline. An adapter of a language "
                "model is trained by `hf-causal-context train-text`."
            ) from error
        raise OSError(
            f"{str(name_or_path)!r} is not a saved diffusers pipeline: {why_unread(name_or_path, error)} A base is a "
            "folder or Hub repository with a model_index.json. For a bare denoiser (a config.json and weights) save a "
            "pipeline around it, for example DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)."
        ) from error


def _is_transformers_model(name_or_path: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether a folder or repository holds a model that transformers knows."""
    try:
        AutoConfig.from_pretrained(name_or_path, revision=revision, token=token)
    except (OSError, ValueError):
        return False
    return True


def check_expert(components: Mapping[str, Any], noise_expert: str | None) -> None:
    """Refuse a pipeline of two denoisers without a choice between them, or the choice where there is one.

    Args:
        components: of the pipeline, by name, as its model_index.json and its config have them.
        noise_expert: "high", "low" or None.

    Raises:
        ValueError: saying what is missing, or what to leave out.
    """
    two = _has_two_denoisers(components)
    if two and noise_expert is None:
        raise UserValueError(
            "This base has two denoisers, one for high and one for low noise, and one is trained at a time. Give "
            "--noise_expert high (what a video shows, how it moves) or low (details); a run of each trains both."
        )
    if noise_expert is not None and not two:
        raise UserValueError(f"--noise_expert={noise_expert}: this base has one denoiser only. Leave it out.")


def _has_two_denoisers(components: Mapping[str, Any]) -> bool:
    return any((components.get("transformer_2") or (None,))[:1])


def as_base(pipe: DiffusionPipeline) -> DiffusionBase:
    """Return the base around a pipeline that is in memory.

    Raises:
        ValueError: for a pipeline that is not supported.
    """
    return _family(type(pipe).__name__)(pipe)


def _family(class_name: object) -> type[DiffusionBase]:
    family = FAMILIES.get(class_name) if isinstance(class_name, str) else None
    if family is None:
        raise UserValueError(
            f"Pipelines of class {class_name!r} are not supported as a base.{nearest(str(class_name), FAMILIES)} "
            f"Supported: {quoted(FAMILIES)}. Save the base as one of them. What works with any pipeline: to train its "
            "denoiser in a loop of your own, get_peft_model(denoiser, config), and to sample in contexts, "
            "load_context_adapter(pipe, folder) and intervene(pipe, context)."
        )
    return family
