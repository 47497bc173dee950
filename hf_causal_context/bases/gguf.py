"""Weights of a base in one GGUF file; all else comes from the base's folder or repository."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from .._files import first_line
from ..errors import MissingPackageError, UserValueError

_MAGIC = b"GGUF"


def check_gguf(name: str | None, quantization: str | None = None) -> None:
    """Refuse what cannot be read here, before anything is loaded.

    Raises:
        MissingPackageError: without the package that reads such files.
        FileNotFoundError: for what is no file, and cannot be one of the Hub.
        ValueError: together with `--quantization`.
    """
    if name is None:
        return
    if quantization is not None:
        raise UserValueError(
            f"--gguf_file={name} says how many bits its weights have, and so does --quantization={quantization}. Leave "
            "one of them out."
        )
    if find_spec("gguf") is None:
        raise MissingPackageError(f"--gguf_file={name} needs gguf: pip install gguf")
    path = Path(name).expanduser()
    if not path.is_file() and (path.is_absolute() or name.startswith(("~", ".")) or name.count("/") < 2):
        raise FileNotFoundError(f"--gguf_file={name} does not exist. Give a path, or user/repository/file.gguf.")


def find_gguf(name: str, token: str | bool | None = None) -> Path:
    """Return a GGUF file of this machine, or one of the Hub's, downloaded.

    Args:
        name: a path, or the id of a repository and the file's name in it: "user/name/model-Q4_K_M.gguf".
        token: for private repositories, as in huggingface_hub.

    Raises:
        FileNotFoundError: for a file that is in neither place, or cannot be reached.
        MissingPackageError: see `check_gguf`.
        ValueError: for a file of another kind.
    """
    check_gguf(name)
    path = Path(name).expanduser()
    if not path.is_file():
        user, repository, file = name.split("/", 2)
        try:
            path = Path(hf_hub_download(f"{user}/{repository}", file, token=token))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"--gguf_file={name} is no file here, nor one of the Hub ({first_line(error)}). Give a path, or "
                "user/repository/file.gguf."
            ) from error
    with path.open("rb") as content:
        if content.read(len(_MAGIC)) != _MAGIC:
            raise UserValueError(f"--gguf_file={name} is no GGUF file. Give one whose name ends with .gguf.")
    return path


def load_denoiser(
    gguf_file: str,
    base: str,
    components: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, nn.Module]:
    """Return the denoiser of a pipeline, with weights that are unpacked where they are used: name -> module.

    Args:
        gguf_file: see `find_gguf`.
        base: folder or Hub id of the pipeline, which says how the denoiser is built.
        components: of its model_index.json: name -> library and class.
        dtype: in which it computes.
        revision: of the base.
        token: for private repositories.

    Raises:
        FileNotFoundError, ValueError: for a pipeline or a file that does not fit.
    """
    import diffusers

    _, class_name = components.get("transformer", (None, None))
    denoiser: Any = getattr(diffusers, str(class_name), None)
    if not hasattr(denoiser, "from_single_file"):
        raise UserValueError(
            f"--gguf_file={gguf_file} is for pipelines whose transformer diffusers reads from single files, and "
            f"{components.get('_class_name')} has {'none' if class_name is None else f'a {class_name}'}. Leave it out, "
            "or give --quantization."
        )
    path = find_gguf(gguf_file, token)
    try:
        module = denoiser.from_single_file(
            str(path),
            config=base,
            subfolder="transformer",
            config_revision=revision,
            token=token,
            dtype=dtype,
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
        )
    except Exception as error:  # what is in the file may be anything, and diffusers raises anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise _unfit(gguf_file, f"transformer ({class_name}) of {base}", reason) from error
    return {"transformer": module}


def load_language_weights(auto_class: Any, gguf_file: str, base: str, **options: Any) -> Any:
    """Return a language model with the weights of a file, which transformers unpacks.

    Args:
        auto_class: transformers' class that loads it.
        gguf_file: see `find_gguf`.
        base: folder or Hub id of the model.
        options: of `from_pretrained`, among them the base's `config`.

    Raises:
        FileNotFoundError, ValueError: for a file that does not fit.
    """
    from transformers import GgufConfig

    path = find_gguf(gguf_file, options.get("token"))
    unpacked = GgufConfig(dequantize=True)  # packed, it would run kernels from the Hub
    try:
        model, found = auto_class.from_pretrained(
            base, gguf_file=str(path), quantization_config=unpacked, output_loading_info=True, **options
        )
    except Exception as error:
        raise _unfit(gguf_file, base, f"{type(error).__name__}: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random
        raise _unfit(gguf_file, base, f"it lacks {len(missing):,} weights, such as {missing[0]!r}.")
    return model


def _unfit(gguf_file: str, base: str, reason: str) -> UserValueError:
    return UserValueError(
        f"--gguf_file={gguf_file} cannot be read as the weights of {base}: {reason.rstrip('.')}. Give a file of that "
        "model, or the base that it was made from."
    )
