"""Language models of transformers: load one, and say what it is."""

from __future__ import annotations

from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from ..errors import UserValueError
from .gguf import check_gguf, load_language_weights
from .names import check_there, unpacked, why_unread
from .quantization import quantization_config

# Arguments of `generate` for one text per row, as tokens, whatever the base's generation_config.json asks for.
ONE_TEXT: dict[str, Any] = {"num_return_sequences": 1, "return_dict_in_generate": False}


def load_language_model(
    name_or_path: str,
    revision: str | None,
    dtype: torch.dtype | str | None,
    quantization: str | None = None,
    gguf_file: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a base from a folder or the Hub; by default only safetensors, and no code from the repository.

    Args:
        name_or_path: folder or Hub id.
        revision: of the base.
        dtype: None for transformers' own choice.
        quantization: one of `QUANTIZATIONS`.
        gguf_file: with the weights, instead of its own; see `find_gguf`.
        token: for a private one.
        options: further ones of transformers' `from_pretrained`.

    Raises:
        OSError, ValueError: what `check_language_model`, `check_gguf` and `load_language_weights` raise.
    """
    check_gguf(gguf_file, quantization)
    config = check_language_model(name_or_path, revision, token)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = {"use_safetensors": True, "revision": revision, "token": token, **options}
    if dtype is not None:
        options["dtype"] = dtype
    if quantization is not None:
        assert isinstance(dtype, torch.dtype)
        options["quantization_config"] = quantization_config(quantization, "transformers", dtype)
    if gguf_file is not None:
        return load_language_weights(auto_class, gguf_file, name_or_path, config=config, **options)
    try:
        return auto_class.from_pretrained(name_or_path, **options)
    except (ValueError, ImportError, SafetensorError) as error:  # a package that it needs, a damaged file
        raise UserValueError(f"The base {name_or_path!r} cannot be loaded: {error}") from error


def load_tokenizer(name_or_path: str, revision: str | None, token: str | bool | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base; no code from the repository.

    Raises:
        OSError, ValueError: for files that are missing or cannot be read, or a package that they need.
    """
    try:
        load: Any = AutoTokenizer.from_pretrained
        tokenizer = load(name_or_path, revision=revision, token=token, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # its files may hold anything, and transformers raises anything
        raise UserValueError(
            f"The tokenizer of {name_or_path!r} cannot be read ({type(error).__name__}: {error}). Save it with the "
            "base: tokenizer.save_pretrained(folder)."
        ) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def check_language_model(name_or_path: str, revision: str | None, token: str | bool | None = None) -> PreTrainedConfig:
    """Return the configuration of a base, without loading it.

    Raises:
        OSError: for something that transformers cannot read.
        ValueError: for a model that does not write text.
    """
    check_there(name_or_path)
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, token=token)
    except (OSError, ValueError) as error:
        if _is_pipeline(name_or_path, revision):
            raise OSError(
                f"{name_or_path!r} could not be read as a model of transformers: it is a diffusers pipeline. An "
                "adapter of one is trained by `hf-causal-context train`."
            ) from error
        raise OSError(
            f"{name_or_path!r} could not be read as a model of transformers: {why_unread(name_or_path, error)} The "
            "base of train-text is a causal or encoder-decoder language model. An adapter of a diffusers pipeline "
            "is trained by `hf-causal-context train`."
        ) from error
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise UserValueError(
            f"{name_or_path!r} is a {config.model_type}, which is neither a causal nor an encoder-decoder language "
            "model. Choose a base that writes text."
        )
    return config


def num_embeddings(model: nn.Module) -> int:
    """Return how many tokens a model has embeddings of, an adapter's trained rows around them or not."""
    return len(cast(Any, model).get_input_embeddings().weight)  # PEFT's wrapper of them has this attribute only


def _is_pipeline(name_or_path: str, revision: str | None) -> bool:
    """Whether a folder or repository holds a pipeline of diffusers."""
    try:
        return cached_file(unpacked(name_or_path), "model_index.json", revision=revision) is not None
    except (OSError, ValueError):
        return False
