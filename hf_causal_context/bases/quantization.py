"""Bases whose frozen weights have fewer bits, by the names of `--quantization`.

The adapter stays in full precision: it is trained and used on top, as LoRA is in QLoRA (Dettmers et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from ..errors import MissingPackageError, UserValueError
from .names import DENOISERS

# Name -> the package that does it.
QUANTIZATIONS = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes", "llm_int8": "bitsandbytes"}
_TORCHAO = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
_NO_INT4 = (
    " torchao packs four bits for GPUs only, or, on a CPU, without a backward pass. Give nf4 on a GPU, or --gguf_file "
    "with a file of four bits."
)


def check_quantization(name: str | None) -> None:
    """Refuse what this machine cannot do.

    Raises:
        MissingPackageError: naming the package that is missing.
        ValueError: for an unknown one, or one that needs a GPU.
    """
    if name is None:
        return
    if name not in QUANTIZATIONS:
        why = _NO_INT4 if name == "int4" else ""
        raise UserValueError(f"--quantization={name} is unknown. Allowed: {', '.join(QUANTIZATIONS)}.{why}")
    if find_spec(package := QUANTIZATIONS[name]) is None:
        raise MissingPackageError(f"--quantization={name} needs {package}: pip install {package}")
    if name not in _TORCHAO and not torch.cuda.is_available():
        raise UserValueError(f"--quantization={name} needs a GPU. Allowed without one: {', '.join(_TORCHAO)}.")


def quantization_config(name: str, library: Literal["diffusers", "transformers"], dtype: torch.dtype) -> Any:
    """Return the configuration of a library's `from_pretrained` for one model.

    Args:
        name: one of `QUANTIZATIONS`.
        library: which the model is of.
        dtype: in which it computes.
    """
    check_quantization(name)
    classes = import_module(library)
    if name in _TORCHAO:
        return classes.TorchAoConfig(getattr(import_module("torchao.quantization"), _TORCHAO[name])())
    if name == "llm_int8":
        return classes.BitsAndBytesConfig(load_in_8bit=True)
    return classes.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def pipeline_quantization(name: str, components: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return the `quantization_config` of a pipeline: of its denoisers, and of text encoders other than small CLIPs.

    Args:
        name: one of `QUANTIZATIONS`.
        components: of model_index.json: name -> library and class.
        dtype: in which they compute.
    """
    from diffusers.quantizers import PipelineQuantizationConfig

    mapping = {}
    for component, described in components.items():
        if component in DENOISERS:
            mapping[component] = quantization_config(name, "diffusers", dtype)
        elif component.startswith("text_encoder") and "CLIP" not in str(described):
            mapping[component] = quantization_config(name, "transformers", dtype)
    return PipelineQuantizationConfig(quant_mapping=mapping)


def keeps_unpacked(model: nn.Module) -> bool:
    """Whether a training step keeps the weights that layers unpack: those of torchao and of GGUF files.

    Those of bitsandbytes are unpacked again in the backward pass.
    """
    return any(hasattr(weight, "__tensor_flatten__") or hasattr(weight, "quant_type") for weight in model.parameters())
