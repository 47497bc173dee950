"""Contexts of a language model's adapter as LoRA: folders for PEFT, vLLM and SGLang, or GGUF files for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

from peft import PeftModel
from torch import Tensor

from .._files import complete_or_absent
from ..adapter.baking import bake
from ..adapter.peft_type import PEFT_PREFIX
from ..adapter.read_back import write_lora
from ..contexts import Context
from ..errors import MissingPackageError, UserValueError
from ..messages.progress import ProgressBar
from ..messages.wording import quoted

TextFormat = Literal["peft", "gguf"]

# model_type of transformers -> architecture of llama.cpp.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def check_text_format(file_format: str) -> TextFormat:
    """Return a format that language models have.

    Raises:
        ValueError: for one that is for pipelines.
        MissingPackageError: without the package that writes GGUF files.
    """
    if file_format not in ("peft", "gguf"):
        raise UserValueError(
            f"--format {file_format} is for pipelines of diffusers, and the adapter is of a language model. Use peft "
            "(PEFT, vLLM, SGLang) or gguf (llama.cpp)."
        )
    if file_format == "gguf" and find_spec("gguf") is None:
        raise MissingPackageError("--format gguf needs gguf: pip install gguf")
    return cast(TextFormat, file_format)


def export_text_contexts(model: PeftModel, files: Mapping[Path, Context], file_format: TextFormat) -> None:
    """Write one LoRA per context; each appears complete or not at all.

    Args:
        model: a language model with its adapter, which is called "default".
        files: where each context goes; see `lora_paths`.
        file_format: "peft" for folders, "gguf" for files.

    Raises:
        ValueError: for what `bake` refuses, a model that llama.cpp's files are not known for, or a module without a
            place in them.
    """
    for path, context in ProgressBar(files.items(), desc="export", unit="context"):
        config, weights = bake(model, context)
        if file_format == "peft":
            write_lora(path, model, config, weights)
            continue
        tensors = _gguf_tensors(cast(Any, model).config, weights)
        with complete_or_absent(path) as unfinished:
            _write_gguf(unfinished, _ARCHITECTURES[cast(Any, model).config.model_type], config.r, tensors)


def _gguf_tensors(config: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a baked LoRA under the names, and with the rows in the order, of llama.cpp's files of the base."""
    gguf: Any = import_module("gguf")
    if config.model_type not in _ARCHITECTURES:
        raise UserValueError(
            f"The base is a {config.model_type}, whose weights llama.cpp may keep in another order. --format gguf "
            f"knows {quoted(_ARCHITECTURES)}. Use `hf-causal-context merge`, and llama.cpp's own converter."
        )
    architecture = _ARCHITECTURES[config.model_type]
    kind = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for key, weight in weights.items():
        module, _, part = key.removeprefix(PEFT_PREFIX).partition(".lora_")
        name = names.get_name(module)
        # Where the output layer is tied to the embedding, files have no weight of its own.
        missing = name == "output" and config.tie_word_embeddings
        if name is None or missing or part not in ("A.weight", "B.weight"):
            raise UserValueError(
                f"{module!r} has no place in a LoRA of llama.cpp for a {config.model_type}. Train without it, or use "
                "`hf-causal-context merge`, and llama.cpp's own converter."
            )
        heads = _HEADS.get(module.rpartition(".")[2])
        if part == "B.weight" and heads is not None and architecture == "llama":
            # There, rotary positions turn neighbors instead of halves.
            weight = weight.unflatten(0, (getattr(config, heads), 2, -1)).transpose(1, 2).reshape(weight.shape)
        tensors[f"{name}.weight.lora_{part[0].lower()}"] = weight
    return tensors


def _write_gguf(path: Path, architecture: str, rank: int, tensors: Mapping[str, Tensor]) -> None:
    gguf: Any = import_module("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # factor 1: the scale is in B
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
