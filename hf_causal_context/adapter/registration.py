"""Tells PEFT of the method."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from . import lora_conversion
from .config import CausalContextConfig
from .model import CausalContextModel
from .peft_type import CAUSAL_CONTEXT, NAME


def register() -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and transformers' `load_adapter` know the method."""
    if CAUSAL_CONTEXT not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME, config_cls=CausalContextConfig, model_cls=CausalContextModel)
    lora_conversion.install()
