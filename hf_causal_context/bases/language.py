"""Language models of transformers: load one, and say what it is."""

from __future__ import annotations

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..errors import UserValueError


def load_language_model(name_or_path: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Load a base from a folder or the Hub; only safetensors, and no code from the repository.

    Raises:
        OSError, ValueError: what `check_language_model` raises.
    """
    config = check_language_model(name_or_path, revision)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto_class.from_pretrained(name_or_path, revision=revision, dtype=dtype, use_safetensors=True)


def check_language_model(name_or_path: str, revision: str | None) -> PreTrainedConfig:
    """Return the configuration of a base, without loading it.

    Raises:
        OSError: for something that transformers cannot read.
        ValueError: for a model that does not write text.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name_or_path!r} could not be read as a model of transformers: {error} The base of train-text is a "
            "causal or encoder-decoder language model. An adapter of a diffusers pipeline is trained by "
            "`hf-causal-context train`."
        ) from error
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise UserValueError(
            f"{name_or_path!r} is a {config.model_type}, which is neither a causal nor an encoder-decoder language "
            "model. Choose a base that writes text."
        )
    return config
