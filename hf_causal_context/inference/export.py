"""Chosen contexts as LoRA files that other tools read: what `hf-causal-context export` does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .._files import complete_or_absent
from ..adapter.baking import adapter_config, bake, check_linear, context_strengths
from ..adapter.config import CausalContextConfig
from ..adapter.layer import CausalContextLayer
from ..adapter.peft_type import PEFT_PREFIX
from ..adapter.read_back import write_lora
from ..bases.diffusion_base import DiffusionBase
from ..contexts import ConceptSet, Context
from ..errors import UserValueError
from ..messages.progress import ProgressBar
from ..messages.wording import quoted
from .comfyui import comfyui_format, lumina_state
from .context_files import context_files

FileFormat = Literal["peft", "diffusers", "kohya", "comfyui"]
_SUFFIXES = {"peft": "", "gguf": ".gguf"}  # of files, where it is not .safetensors

# What kohya's scripts call the models with text embeddings of this width.
_KOHYA_MODELS = {768: "sd_v1", 2048: "sdxl_base_v1-0"}

# Of components that have none of their own in files: load_lora_weights(..., load_into_transformer_2=True).
_FILE_NAMES = {"transformer_2": "transformer"}

# PEFT's config, and weights by the path in the component that they are for.
_Lora: TypeAlias = tuple[LoraConfig, dict[str, Tensor]]


def export_contexts(
    base: DiffusionBase,
    contexts: Sequence[str],
    output_dir: Path,
    *,
    file_format: FileFormat = "diffusers",
    calibrated: bool = False,
) -> list[Path]:
    """Write one LoRA per context of the adapter in a pipeline, and return the paths.

    Every file appears complete or not at all.

    Args:
        base: its adapters, of the denoiser and perhaps of text encoders, are those called "default".
        contexts: such as "thick+slant" or "thick=0.5"; "singles" and "pairs" stand for all of them, "obs" for the empty
            one.
        output_dir: takes `thick+slant.safetensors`, or with "peft" the folder `thick+slant`.
        file_format: "peft" (`PeftModel.from_pretrained`), "diffusers" (`load_lora_weights`), "kohya" (the tools
            around Stable Diffusion) or "comfyui" (what ComfyUI reads for the base).
        calibrated: the strengths in `contexts` are positions of dials; see `intervene`. The files keep their names.

    Raises:
        ValueError: for no or unknown contexts, the empty context where it is the base, contexts with one file name, a
            format that the pipeline or the adapter cannot have, or what `bake` refuses.
        FileExistsError: for files that exist.
    """
    models = {
        name: module
        for name, module in {base.denoiser_name: base.denoiser, **base.pipe.components}.items()  # the denoiser first
        if isinstance(module, nn.Module) and any(isinstance(m, CausalContextLayer) for m in module.modules())
    }
    files = lora_paths(adapter_config(base.denoiser), contexts, output_dir, file_format, calibrated)
    if file_format == "comfyui":
        file_format = comfyui_format(base)
    if file_format != "peft":
        _check_format(base, models, file_format)
    for path, context in ProgressBar(files.items(), desc="export", unit="context"):
        if file_format == "peft":
            baked = {name: bake(model, context) for name, model in models.items()}  # refuses before anything is written
            with complete_or_absent(path) as unfinished:
                for name, lora in baked.items():
                    write_lora(unfinished if name == base.denoiser_name else unfinished / name, models[name], *lora)
            continue
        loras = {_FILE_NAMES.get(name, name): _lora(name, model, context) for name, model in models.items()}
        state = lumina_state(base.denoiser, loras[base.denoiser_name][1]) if file_format == "comfyui" else {}
        if file_format == "kohya":
            state = _kohya_state(base, loras)
        with complete_or_absent(path) as unfinished:
            if file_format == "kohya":
                save_file(state, unfinished, metadata=_kohya_metadata(base, loras, path.stem))
            elif file_format == "comfyui":
                save_file(state, unfinished, metadata={"format": "pt"})
            else:
                _write_diffusers(base, loras, unfinished)
                _check_readable(base, load_file(unfinished), loras, file_format)
    return list(files)


def lora_paths(
    config: CausalContextConfig,
    names: Sequence[str],
    output_dir: Path,
    file_format: FileFormat | Literal["gguf"],
    calibrated: bool = False,
) -> dict[Path, Context]:
    """Path -> context, none of which exists."""
    check_linear(config)
    concepts = ConceptSet(config.concepts)
    words = {
        "singles": [Context(name) for name in concepts],
        "pairs": [Context(*pair) for pair in combinations(concepts, 2)],
        "obs": [Context()],
    }
    concepts.check_words(names, words)
    wanted: dict[Context, None] = {}  # a context that is given twice is one file
    for name in names:
        wanted |= dict.fromkeys(words[name] if name in words and name not in concepts else [Context.parse(name)])
    context_strengths(config, list(wanted))  # refuses what the adapter does not have
    if not wanted:
        raise UserValueError(
            f"contexts={list(names)} name nothing to export from an adapter with the concepts {quoted(concepts)}. Give "
            "such as 'singles', or a context."
        )
    is_base = not config.observational_rank and (config.mechanism == "independent" or config.anchored)
    if Context() in wanted and is_base:
        raise UserValueError(
            "The empty context of this adapter is the base model itself; its LoRA would change nothing. Leave it out."
        )
    suffix = _SUFFIXES.get(file_format, ".safetensors")
    files = {
        output_dir / (name + suffix): config.calibrated(context) if calibrated else context
        for context, name in context_files(wanted).items()
    }
    if existing := [str(path) for path in files if path.exists()]:
        raise FileExistsError(f"These exist: {', '.join(existing)}. Choose another --output_dir, or remove them.")
    return files


def _check_format(base: DiffusionBase, models: dict[str, nn.Module], file_format: FileFormat) -> None:
    pipeline = type(base.pipe).__name__
    if not isinstance(base.pipe, LoraBaseMixin):
        raise UserValueError(
            f"{pipeline} has no load_lora_weights, so no file of the format {file_format!r} could be loaded into it. "
            f"Use --format peft, and PeftModel.from_pretrained(pipe.{base.denoiser_name}, folder)."
        )
    if file_format == "kohya" and base.denoiser_name != "unet":
        raise UserValueError(
            f"The format 'kohya' is for the UNets of Stable Diffusion and SDXL; {pipeline} has a {base.denoiser_name}. "
            "Use --format diffusers."
        )
    loadable = base.pipe._lora_loadable_modules
    for name, model in models.items():
        if name not in loadable:
            raise UserValueError(
                f"The adapter of {name!r} has no place in the format {file_format!r}: {pipeline} loads LoRAs of "
                f"{quoted(loadable)} only. Use --format peft."
            )
        if adapter_config(model).modules_to_save:
            raise UserValueError(
                f"The adapter of {name!r} holds whole modules (modules_to_save), which are no LoRA and have no place "
                f"in the format {file_format!r}. Use --format peft."
            )


def _lora(component: str, model: nn.Module, context: Context) -> _Lora:
    config, weights = bake(model, context)
    weights = {key.removeprefix(PEFT_PREFIX): weight for key, weight in weights.items()}
    if component.startswith("text_encoder"):
        # The names in files are those of older versions of transformers, which nest the encoder once more.
        weights = {f"text_model.{key}" if key.startswith("encoder.") else key: w for key, w in weights.items()}
    return config, weights


def _write_diffusers(base: DiffusionBase, loras: dict[str, _Lora], path: Path) -> None:
    arguments: dict[str, Any] = {}
    for component, (config, weights) in loras.items():
        if component.startswith("text_encoder"):
            # Without attention projections, diffusers knows the names of a text encoder in this form only.
            forms = {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}
            for ours, theirs in forms.items():
                weights = {key.replace(ours, theirs): weight for key, weight in weights.items()}
        arguments[f"{component}_lora_layers"] = weights
        # Not the whole config: another version of PEFT may not know its fields.
        arguments[f"{component}_lora_adapter_metadata"] = {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted({key.split(".lora_")[0].removeprefix("text_model.") for key in weights}),
        }
    cast(Any, base.pipe).save_lora_weights(path.parent, weight_name=path.name, **arguments)


def _kohya_state(base: DiffusionBase, loras: dict[str, _Lora]) -> dict[str, Tensor]:
    # One alpha for all modules, because diffusers' reader loses those of attention modules that differ from the rest.
    alpha = max(config.r for config, _ in loras.values())
    state = {}
    for component, (_, weights) in loras.items():
        if component.startswith("text_encoder"):
            # Diffusers knows its attention by the last projection, which training leaves out by default.
            last = {re.sub(r"\.[qkv]_proj\.", ".out_proj.", key): torch.zeros_like(w) for key, w in weights.items()}
            weights = last | weights
        for key, weight in weights.items():
            scaled = weight * (weight.shape[1] / alpha) if ".lora_B." in key else weight
            state[f"{component}.{key}"] = scaled
    kohya = convert_state_dict_to_kohya(state)
    kohya |= {key: torch.tensor(float(alpha)) for key in kohya if key.endswith(".alpha")}
    if "text_encoder_2" not in base.pipe.components:  # with a single encoder, it has no number
        kohya = {key.replace("lora_te1_", "lora_te_", 1): weight for key, weight in kohya.items()}
    _check_readable(base, dict(kohya), loras, "kohya")
    return kohya


def _check_readable(
    base: DiffusionBase, written: dict[str, Tensor], loras: dict[str, _Lora], file_format: FileFormat
) -> None:
    """Refuse modules that diffusers does not find again: underscores for dots lose what a name was."""
    state = cast(Any, base.pipe).lora_state_dict(written)
    read = state[0] if isinstance(state, tuple) else state
    wanted = [f"{component}.{key}" for component, (_, weights) in loras.items() for key in weights]
    found = set()
    for component in loras:
        part = {k.removeprefix(f"{component}."): w for k, w in read.items() if k.startswith(f"{component}.")}
        if component == "unet":
            part = convert_unet_state_dict_to_peft(part)
        elif component.startswith("text_encoder"):
            with suppress(ValueError):  # of names that it cannot tell the form of
                part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
        found |= {f"{component}.{key}" for key in part}
    if lost := sorted({key.split(".lora_")[0] for key in wanted if key not in found}):
        raise UserValueError(
            f"Diffusers cannot read the modules {quoted(lost)} from the format {file_format!r}. Use --format "
            f"{'diffusers' if file_format == 'kohya' else 'peft'}, or train without them."
        )


def _kohya_metadata(base: DiffusionBase, loras: dict[str, _Lora], title: str) -> dict[str, str]:
    rank = str(max(config.r for config, _ in loras.values()))
    metadata = {"format": "pt", "modelspec.title": title, "ss_network_module": "networks.lora"}
    metadata |= {"ss_network_dim": rank, "ss_network_alpha": rank}
    width = cast(Any, base.denoiser).config.cross_attention_dim
    if isinstance(width, int) and width in _KOHYA_MODELS:
        metadata["ss_base_model_version"] = _KOHYA_MODELS[width]
    return metadata
